"""Seconds are counted once, whatever a run is interrupted by."""

import time

import pytest

from trainer.goodput import KINDS, Goodput, reported_seconds


def test_what_is_spent_is_counted_and_reported():
    goodput = Goodput()
    with goodput.spend('saving'):
        time.sleep(0.05)
    goodput.spent_on_steps(9.0, 0.0, is_traced=False)
    goodput.spent_on_steps(4.0, 1.5, is_traced=True)
    goodput.spent_on_steps(1.0, 1.5, is_traced=True)  # two clocks never agree
    seconds = goodput.seconds
    assert seconds['saving'] >= 0.05
    assert (seconds['compiling'], seconds['stepping'], seconds['data_wait']) == (9.0, 2.5, 2.5)
    metrics = goodput.metrics()
    assert metrics.keys() == {'train/goodput', *(f'train/secs_{kind}' for kind in KINDS)}
    assert metrics['train/goodput'] == pytest.approx(2.5 / sum(seconds.values()))
    assert reported_seconds(metrics) == pytest.approx(sum(seconds.values()))
    assert 'stepping 2.5 s' in str(goodput) and 'lost 0.0 s' in str(goodput)


def test_what_was_done_since_the_checkpoint_is_lost():
    goodput = Goodput()
    goodput.resume({'stepping': 10.0, 'saving': 1.0, 'lost': 2.0}, total=20.0)
    assert goodput.seconds == {'stepping': 10.0, 'saving': 1.0, 'lost': 9.0}
    goodput.resume({'stepping': 10.0}, total=3.0)  # the last report was made before the checkpoint
    assert goodput.seconds == {'stepping': 10.0, 'lost': 0.0}


def test_nothing_is_counted_as_nothing():
    assert Goodput().metrics()['train/goodput'] == 0.0
    assert reported_seconds({'train/loss': 1.0, 'train/secs_lost': None}) == 0.0
