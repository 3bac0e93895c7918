"""Saves run beside the training, hold the values of their step, and survive a disk that is full for a while."""

import errno
import logging
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from trainer import checkpoint, saver
from trainer.recipe import Train
from trainer.saver import SaveError, Saver, keep_best


def settings(**values):
    return Train(epochs=1, global_batch_size=8, model=len, optimizer=len, schedule=len,
                 **{'checkpoint_every_steps': 10, 'keep_checkpoints': 2, **values})


@pytest.fixture
def variables():
    return {'step': tf.Variable(0, dtype=tf.int64), 'params/kernel': tf.Variable(tf.zeros([4, 3]))}


def names(directory):
    return [path.name for path in checkpoint.list_checkpoints(directory)]


def stored(path, variables):
    tensors = checkpoint.load(path, variables)
    assert np.unique(tensors['params/kernel']).tolist() == [tensors['step']]
    return int(tensors['step'])


@pytest.fixture
def broken(monkeypatch):
    """While its 'error' is set, checkpoints cannot be written."""
    state, write = {'error': None, 'tries': 0}, checkpoint._write

    def fail(*arguments):
        state['tries'] += 1
        if state['error']:
            raise state['error']
        write(*arguments)

    monkeypatch.setattr(checkpoint, '_write', fail)
    monkeypatch.setattr(saver, '_RETRY_SECS', 0.0)
    return state


def test_a_save_holds_the_values_of_its_step_while_training_goes_on(tmp_path, variables, monkeypatch):
    is_open, write = threading.Event(), checkpoint._write
    monkeypatch.setattr(checkpoint, '_write', lambda *arguments: (is_open.wait(30), write(*arguments)))
    writer = Saver(tmp_path, variables, settings())
    variables['step'].assign(10)
    variables['params/kernel'].assign(tf.fill([4, 3], 10.0))
    writer.save(10, {})
    variables['step'].assign_add(1)
    variables['params/kernel'].assign_add(tf.ones([4, 3]))
    assert names(tmp_path) == []
    is_open.set()
    writer.finish(10, int)
    assert stored(tmp_path / 'ckpt-00000010', variables) == 10


def test_what_is_kept(tmp_path, variables):
    writer = Saver(tmp_path, variables, settings(keep_every_steps=40))
    for step in (10, 20, 30, 40, 50, 60, 63, 66, 69):  # the last three by the clock
        writer.save(step, {})
    writer.finish(10, int)
    # Every 40th; the newest two; and the newest that any other run makes too, to roll back to.
    assert names(tmp_path) == ['ckpt-00000040', 'ckpt-00000060', 'ckpt-00000066', 'ckpt-00000069']
    checkpoint.remove_after(tmp_path, 60)
    assert names(tmp_path) == ['ckpt-00000040', 'ckpt-00000060']


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'),
                                   tf.errors.ResourceExhaustedError(None, None, 'state; No space left on device'),
                                   OSError(errno.EROFS, 'Read-only file system')], ids=repr)
def test_what_cannot_be_saved_is_said_and_tried_again(tmp_path, variables, broken, caplog, error):
    writer = Saver(tmp_path, variables, settings())
    writer.save(10, {})
    writer.finish(10, int)
    broken['error'] = error
    writer.save(20, {})
    while not writer.is_due():  # the thread has not failed yet
        time.sleep(0.01)
    assert names(tmp_path) == ['ckpt-00000010'] and not list(tmp_path.glob('.writing-ckpt*'))
    assert 'CANNOT SAVE' in caplog.text and str(tmp_path) in caplog.text
    broken['error'] = None
    writer.save(21, {})
    writer.finish(10, int)
    assert names(tmp_path) == ['ckpt-00000010', 'ckpt-00000021'] and not writer.is_due()


def test_the_last_save_is_tried_until_it_succeeds(tmp_path, variables, broken):
    broken['error'] = OSError(errno.ENOSPC, 'No space left on device')
    writer = Saver(tmp_path, variables, settings())
    writer.save(10, {})
    threading.Timer(1.5, lambda: broken.update(error=None)).start()
    writer.finish(60, int)
    assert names(tmp_path) == ['ckpt-00000010'] and broken['tries'] >= 2


def test_what_has_failed_and_was_said_is_still_tried_before_a_run_goes_back(tmp_path, variables, broken, monkeypatch):
    broken['error'] = OSError(errno.ENOSPC, 'No space left on device')
    writer = Saver(tmp_path, variables, settings())
    writer.save(10, {})
    while not writer.is_due():  # which has seen the failure
        time.sleep(0.01)
    monkeypatch.setattr(saver, '_RETRY_SECS', 60.0)
    assert not writer.is_due()
    broken['error'] = None
    writer.finish(10, int)
    assert names(tmp_path) == ['ckpt-00000010']


def test_it_ends_when_nothing_can_be_saved_for_too_long(tmp_path, variables, broken):
    broken['error'] = OSError(errno.EIO, 'Input/output error')
    writer = Saver(tmp_path, variables, settings(save_retry_secs=0.3))
    with pytest.raises(SaveError, match='train.save_retry_secs.*Input/output error'):
        for step in range(1000):
            if writer.is_due() or step == 0:
                writer.save(step, {})
            time.sleep(0.01)
    assert step < 900
    writer = Saver(tmp_path, variables, settings())
    writer.save(10, {})
    with pytest.raises(SaveError):
        writer.finish(1.5, int)


def test_by_the_clock(tmp_path, variables):
    writer = Saver(tmp_path, variables, settings(checkpoint_every_secs=0.2))
    assert not writer.is_due()
    time.sleep(0.25)
    assert writer.is_due()
    writer.save(3, {})
    assert not writer.is_due()


def test_of_many_workers_one_saves(tmp_path, variables):
    writer = Saver(None, variables, settings(checkpoint_every_secs=1e-9))
    writer.save(10, {})
    writer.finish(1, int)
    assert not writer.is_due() and not list(tmp_path.iterdir())


def test_the_best_is_kept_and_a_failure_is_said(tmp_path, variables, broken, caplog):
    for step, top1 in ((1, 0.5), (2, 0.4), (3, 0.6)):
        variables['step'].assign(step)
        variables['params/kernel'].assign(tf.fill([4, 3], float(step)))
        keep_best(tmp_path, step, {'eval/top1': top1, 'eval_ema/top1': 1 - top1}, variables, {})
    assert names(tmp_path) == ['ckpt-00000002'] and stored(tmp_path / 'ckpt-00000002', variables) == 2
    broken['error'] = OSError(errno.ENOSPC, 'No space left on device')
    with caplog.at_level(logging.WARNING):
        keep_best(tmp_path, 4, {'eval/top1': 0.9, 'eval_ema/top1': 0.9}, variables, {})
    assert names(tmp_path) == ['ckpt-00000002'] and 'CANNOT SAVE' in caplog.text


def test_the_other_workers_are_told_all_the_time_that_one_cannot_save(tmp_path, variables, broken):
    """Or they would take it for lost: all come to as many sums, and leave them together."""
    writer, other, sums = Saver(tmp_path, variables, settings()), Saver(None, variables, settings()), []
    broken['error'] = OSError(errno.ENOSPC, 'full')
    writer.save(10, {})

    def sum_of_writer(value):
        sums.append(value)
        if len(sums) == 2:
            broken['error'] = None
        return value

    writer.finish(60, sum_of_writer)
    assert sums == [1, 1, 0] and names(tmp_path) == ['ckpt-00000010']
    values = iter(sums)
    other.finish(60, lambda value: value + next(values))
    assert next(values, None) is None
