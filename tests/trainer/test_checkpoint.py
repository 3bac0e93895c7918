"""Checkpoints are whole or not there: read by TensorFlow's own loaders, killed in any place, of this model only."""

import itertools
import os
import pathlib
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from checkpoint_harness import FILES, META, names, read, save, variables_of

from trainer import checkpoint
from trainer.optimizer import sgd
from trainer.recipe import ConfigError, Train
from trainer.state import build_train_state


class Killed(BaseException):
    """Stands for the end of the process: nothing in the program may catch it."""


def settings(**values):
    return Train(epochs=1, global_batch_size=8, model=len, optimizer=len, schedule=len, **values)


def test_tensorflows_own_loaders_read_it(directory):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name='head'),
                              keras.layers.BatchNormalization(name='bn')], name='numbered_by_the_process_7')
    state = build_train_state(model, sgd()[0], settings(ema_decay=0.9))
    state.step.assign(7)
    state.position.assign(7 * 32)
    path = checkpoint.save(directory, 7, state.variables(), META, keep=3)
    assert path == directory / 'ckpt-00000007'
    assert sorted(os.listdir(path)) == list(FILES)
    assert tf.train.latest_checkpoint(str(directory)) == str(path / 'state')

    params = ('head/kernel', 'head/bias', 'bn/gamma', 'bn/beta')
    stats = ('bn/moving_mean', 'bn/moving_variance')
    for prefix in (directory, path / 'state'):
        reader = tf.train.load_checkpoint(str(prefix))
        assert sorted(reader.get_variable_to_shape_map()) == sorted(
            ['step', 'position', *(f'params/{p}' for p in params), *(f'batch_stats/{p}' for p in stats),
             *(f'slots/momentum/{p}' for p in params), *(f'ema/{p}' for p in params + stats)])
        assert (reader.get_tensor('step'), reader.get_tensor('position')) == (7, 224)
        np.testing.assert_array_equal(reader.get_tensor('params/head/kernel'), model.get_layer('head').kernel.numpy())
        np.testing.assert_array_equal(reader.get_tensor('ema/head/kernel'), model.get_layer('head').kernel.numpy())
        np.testing.assert_array_equal(reader.get_tensor('slots/momentum/bn/gamma'), np.zeros(3))


def test_a_restored_state_is_the_saved_one(directory):
    def build(seed):
        keras.utils.set_random_seed(seed)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name='head')])
        return build_train_state(model, sgd()[0], settings())

    saved, other = build(0), build(1)
    saved.step.assign(5)
    path = checkpoint.save(directory, 5, saved.variables(), META, keep=1)
    assert np.any(saved.params['head/kernel'].numpy() != other.params['head/kernel'].numpy())
    other.restore(checkpoint.load(path, other.variables()))
    for name, variable in saved.variables().items():
        np.testing.assert_array_equal(other.variables()[name].numpy(), variable.numpy())


def test_a_moved_run_is_still_read(directory):
    save(directory, 7)
    moved = directory.parent.rename(directory.parent.parent / 'elsewhere') / 'checkpoints'
    assert tf.train.latest_checkpoint(str(moved)) == str(moved / 'ckpt-00000007' / 'state')
    assert read(checkpoint.latest_valid(moved)) == 7


def test_meta_holds_what_was_given_and_the_checksum_of_each_file(directory):
    meta = checkpoint.read_meta(save(directory, 7))
    assert meta.items() >= {**META, 'step': 7}.items()
    assert sorted(meta['sha256']) == list(FILES)


def test_equal_values_give_equal_files(directory):
    """Nothing of the clock or of the process stands in a checkpoint."""
    one, two = save(directory / 'one', 7), save(directory / 'two', 7)
    assert [(one / name).read_bytes() for name in FILES] == [(two / name).read_bytes() for name in FILES]


def test_the_newest_are_kept(directory):
    for step in range(10, 80, 10):
        save(directory, step, keep=3)
        newest = [f'ckpt-{s:08d}' for s in range(10, step + 1, 10)][-3:]
        assert names(directory) == ['checkpoint', *newest]
    assert read(checkpoint.latest_valid(directory)) == 70


def test_one_is_kept(directory):
    for step in (1, 2, 3):
        save(directory, step, keep=1)
    assert names(directory) == ['checkpoint', 'ckpt-00000003']


def test_order_is_that_of_numbers_beyond_eight_digits(directory):
    for step in (99_999_998, 100_000_001, 99_999_999):
        save(directory, step)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(directory)] == [
        99_999_998, 99_999_999, 100_000_001]


def test_what_is_no_checkpoint_is_left_alone(directory):
    directory.mkdir(parents=True)
    (directory / 'ckpt-00000009').write_text('a file')
    (directory / 'ckpt-9').mkdir()
    (directory / 'notes').mkdir()
    assert checkpoint.list_checkpoints(directory) == []
    assert checkpoint.latest_valid(directory) is None
    save(directory, 7, keep=1)
    assert names(directory) == ['checkpoint', 'ckpt-00000007', 'ckpt-00000009', 'ckpt-9', 'notes']


def test_nothing_there_yet(directory):
    assert checkpoint.list_checkpoints(directory) == []
    assert checkpoint.latest_valid(directory) is None


def test_the_same_step_again_replaces_it(directory):
    save(directory, 5)
    save(directory, 7, value=1)
    path = save(directory, 7, value=2)
    assert names(directory) == ['checkpoint', 'ckpt-00000005', 'ckpt-00000007']
    assert checkpoint.latest_valid(directory) == path
    assert read(path) == 2


def test_leftovers_of_killed_saves_are_removed(directory):
    directory.mkdir(parents=True)
    for name in ('.writing-ckpt-00000007', '.writing-ckpt-00000003'):
        (directory / name).mkdir()
        (directory / name / 'state.data-00000-of-00001').write_bytes(b'half')
    (directory / '.writing-pointer').write_text('half')
    save(directory, 7)
    assert names(directory) == ['checkpoint', 'ckpt-00000007']


def stages(monkeypatch, kill_at, kill_after):
    """Ends the save at the `kill_at`-th operation on files, before or after it is done; returns those so far."""
    done = []

    def patch(owner, name):
        original = getattr(owner, name)

        def operation(*args, **kwargs):
            done.append(name)
            is_last = len(done) == kill_at + 1
            if is_last and not kill_after:
                raise Killed(name)
            result = original(*args, **kwargs)
            if is_last:
                raise Killed(name)
            return result

        monkeypatch.setattr(owner, name, operation)

    patch(tf.raw_ops, 'SaveV2')
    patch(os, 'fsync')
    patch(shutil, 'rmtree')
    for name in ('mkdir', 'write_text', 'rename'):
        patch(pathlib.Path, name)
    return done


@pytest.mark.parametrize('kill_after', [False, True])
@pytest.mark.parametrize('step', [30, 20])
def test_killed_at_any_point_the_last_good_one_stays(directory, monkeypatch, step, kill_after):
    """Of steps 10 and 20, either step 30 is saved or step 20 again, and the save ends in each place that there is."""
    for kill_at in itertools.count():
        workdir = directory / str(kill_at)
        save(workdir, 10, keep=2)
        save(workdir, 20, keep=2)
        (workdir / '.writing-ckpt-00000030').mkdir()  # that of an earlier kill has to go first
        with monkeypatch.context() as context:
            done = stages(context, kill_at, kill_after)
            try:
                save(workdir, step, keep=2, value=99)
                is_killed = False
            except Killed:
                is_killed = True
        restorable = checkpoint.latest_valid(workdir)
        assert restorable is not None, done
        assert read(restorable) in ({99, 20} if step == 30 else {99, 20, 10}), done  # 10 while 20 is being replaced
        if step == 30:
            pointed = tf.train.latest_checkpoint(str(workdir))
            assert pathlib.Path(pointed).parent in checkpoint.list_checkpoints(workdir), done
        if not is_killed:
            break
        # The same command again.
        assert read(save(workdir, 40, keep=2)) == 40
        assert [name for name in names(workdir) if name.startswith('.')] == []
        assert len(checkpoint.list_checkpoints(workdir)) == 2
    assert kill_at == len(done) > 10
    assert set(done) == {'SaveV2', 'fsync', 'rmtree', 'mkdir', 'write_text', 'rename'}


def test_every_file_is_flushed_before_the_name_is_given(directory, monkeypatch):
    events, fsync, rename = [], os.fsync, pathlib.Path.rename

    def record_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}')))
        return fsync(descriptor)

    def record_rename(path, target):
        events.append(f'{path.name} -> {target.name}')
        return rename(path, target)

    monkeypatch.setattr(os, 'fsync', record_fsync)
    monkeypatch.setattr(pathlib.Path, 'rename', record_rename)
    save(directory, 7)
    commit = events.index('.writing-ckpt-00000007 -> ckpt-00000007')
    assert sorted(events[:commit]) == ['.writing-ckpt-00000007', *FILES]
    assert events[commit + 1:] == ['checkpoints', '.writing-pointer', '.writing-pointer -> checkpoint', 'checkpoints']


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'params/tail/kernel': [4]}, ['missing params/tail/kernel', 'left over none', 'other shape none']),
        ({'params/head/kernel': [3, 2]}, ['missing none', 'left over none', 'other shape params/head/kernel']),
        ({'params/head/kernel': None, 'params/neck/kernel': [2, 3]},
         ['missing params/neck/kernel', 'left over params/head/kernel', 'other shape none']),
        ({f'params/{i}/kernel': [1] for i in range(6)}, ['missing params/0/kernel', 'params/2/kernel and 3 more']),
        ({'params/head/kernel': None}, ['missing none', 'left over params/head/kernel', 'other shape none']),
        ({'batch_stats/bn/moving_mean': None}, ['missing none', 'left over batch_stats/bn/moving_mean']),
        ({'slots/momentum/head/kernel': None}, ['missing none', 'left over slots/momentum/head/kernel']),
    ],
)
def test_another_model_is_refused_in_one_line(directory, change, words):
    path, variables = save(directory, 7), variables_of(0)
    for name, shape in change.items():
        variables.pop(name, None)
        if shape is not None:
            variables[name] = tf.Variable(tf.zeros(shape))
    with pytest.raises(ConfigError) as error:
        checkpoint.load(path, variables)
    message = str(error.value)
    assert [word for word in [str(path), *words] if word not in message] == []
    assert '\n' not in message


def test_a_guard_that_the_checkpoint_does_not_have_begins_anew(directory):
    """Or train.rollback_after could not be bound once it is needed."""
    path, variables = save(directory, 7), variables_of(0)
    variables['guard/rollbacks'] = tf.Variable(0, dtype=tf.int64)
    assert checkpoint.load(path, variables).keys() == variables.keys() - {'guard/rollbacks'}
