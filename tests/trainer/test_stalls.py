"""What makes steps wait is found, on whichever worker, and said once."""

import logging
import threading

import pytest

from trainer.stalls import Stalls

NUM_THREADS = 4


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: set(range(NUM_THREADS)))


def one_worker():
    return Stalls(int, 0, 1)


def work(stalls, steps=10.0, wait=0.0, **stages):
    """Seconds of steps and of each thread's average."""
    stalls.spent({stage: secs * NUM_THREADS for stage, secs in stages.items()})
    stalls.spent_on_steps(steps, wait, is_traced=True)
    return stalls.metrics()


@pytest.mark.parametrize(('stages', 'stage', 'words'), [
    ({'read': 8.0, 'decode': 1.0}, 'read', 'faster disk'), ({'read': 1.0, 'decode': 8.5}, 'decode', 'more cores'),
    ({'decode': 3.0, 'augment': 6.0}, 'augment', 'train_dataset.augment'),
    ({'decode': 3.0, 'batch': 6.0}, 'batch', 'image_size'), ({'decode': 2.0, 'augment': 1.0}, 'copy', 'image_size')])
def test_the_busiest_stage_is_named_with_what_would_help_and_by_how_much(caplog, stages, stage, words):
    metrics = work(one_worker(), wait=2.0, **stages)
    assert metrics['train/worst_data_wait'] == pytest.approx(0.2)
    for name, secs in stages.items():
        assert metrics[f'train/input_{name}'] == pytest.approx(secs / 10)
    assert metrics['train/input_copy'] == pytest.approx(1 - sum(stages.values()) / 10)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and '\n' not in record.message
    for word in ('20 %', f'{stage} took', f'{stage} first', '1.25 times', words):
        assert word in record.message


def test_it_is_said_once_and_only_above_five_percent(caplog):
    stalls = one_worker()
    work(stalls, wait=0.49, decode=9.0)
    assert not caplog.records
    work(stalls, wait=0.51, decode=9.0)
    work(stalls, wait=5.0, decode=9.0)
    assert len(caplog.records) == 1
    work(stalls, wait=5.0, read=9.0)
    assert len(caplog.records) == 2


def test_a_loop_that_compiled_says_nothing(caplog):
    stalls = one_worker()
    stalls.spent({'decode': 100.0})
    stalls.spent_on_steps(30.0, 20.0, is_traced=False)
    assert work(stalls, decode=1.0)['train/input_decode'] == pytest.approx(0.1)
    assert stalls.metrics()['train/worst_data_wait'] == 0.0  # nothing since
    assert not caplog.records


def test_all_workers_hear_of_the_worst(caplog):
    """Three workers in three threads, which sum by a barrier."""
    barrier, values, found = threading.Barrier(3), [0, 0, 0], {}

    def sum_over_workers(worker):
        def add(value):
            assert isinstance(value, int)
            values[worker] = value
            barrier.wait()
            total = sum(values)
            barrier.wait()
            return total
        return add

    def run(worker):
        stalls = Stalls(sum_over_workers(worker), worker, 3)
        found[worker] = work(stalls, wait=[0.1, 4.0, 1.0][worker], read=[1.0, 9.0, 2.0][worker])

    workers = [threading.Thread(target=run, args=(worker,)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found[0] == found[1] == found[2]
    assert found[0]['train/worst_data_wait'] == pytest.approx(0.4)
    assert found[0]['train/input_read'] == pytest.approx(0.9)
    assert 'on worker 1, the worst' in caplog.text


def test_a_report_of_nothing_but_a_compiled_loop_says_nothing_of_the_input():
    stalls = one_worker()
    stalls.spent_on_steps(5.0, 1.0, is_traced=False)
    stalls.spent({'decode': 0.2})
    metrics = stalls.metrics()
    assert metrics['train/input_decode'] == metrics['train/worst_data_wait'] == 0
