"""Numbers that go wrong: steps are skipped; after too many in a row a run goes back and past them, alike each time."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from step_harness import POISON, poisonable_network, small_network
from workdir_reader import assert_equal_bits, reports, tensors

import trainer
from input_pipeline import order
from trainer import checkpoint
from trainer.recipe import ConfigError

NUM_STEPS, BATCH, CLASSES, SIZE = 40, 8, 5, 32
EVERY = 10  # steps between two checkpoints
BAD_STEPS = range(23, 28)  # counted from 0
IN_A_ROW = 3
# The third of the skipped steps is number 26, counted from 1; what comes after it is taken after step 20.
FAILED_AT, BACK_AT = 26, 20


def leaping_network():
    """The loss, and with it the gradient, is far too large for a poisoned image."""
    class Leap(keras.layers.Layer):
        def call(self, logits, images):
            return tf.where(images[:, :1, 0, 0] > POISON - 1, 100.0, 1.0) * logits

    network = small_network()
    return keras.Model(network.input, Leap(dtype='float32')(network.output, network.input))


def data(bad_steps):
    """Images and labels; the first image of each of these steps has a poisoned corner."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 250, (NUM_STEPS * BATCH, SIZE, SIZE, 3), np.uint8)
    images[order.permutation(0, 0, len(images))[[step * BATCH for step in bad_steps]], 0, 0] = POISON
    return images, rng.integers(0, CLASSES, len(images))


def fit(workdir, network=poisonable_network, bad_steps=BAD_STEPS, **settings):
    keras.utils.set_random_seed(1)
    return trainer.train(
        network(), *data(bad_steps), epochs=1, global_batch_size=BATCH, workdir=workdir, peak_rate=0.01,
        warmup_epochs=0, max_shift=0, flip=False, pixel_mean=(0, 0, 0), pixel_std=(1 / 255,) * 3,
        **{'checkpoint_every_steps': EVERY, 'log_every_steps': 1, 'steps_per_loop': 4, 'allow_config_change': True,
           **settings})


@pytest.fixture(scope='module')
def rolled_back(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('rolled_back')
    fit(workdir, rollback_after=IN_A_ROW)
    return workdir


def test_after_three_bad_steps_in_a_row_it_goes_back_and_past_them(rolled_back):
    values = tensors(rolled_back)
    assert values['step'] == NUM_STEPS
    # The steps after the checkpoint took what follows the third bad one; of those two more were bad, not three.
    assert values['position'] == (FAILED_AT + NUM_STEPS - BACK_AT) * BATCH
    assert values['guard/rollbacks'] == 1 and all(np.isfinite(value).all() for value in values.values())
    lines = reports(rolled_back)
    (record,) = (line for line in lines if 'train/rollbacks' in line)
    assert record == {'step': BACK_AT + 1, 'train/rollbacks': 1, 'train/rollback_from_step': FAILED_AT,
                      'train/rollback_position': FAILED_AT * BATCH}
    steps = [line for line in lines if 'train/loss' in line]
    assert [line['step'] for line in steps] == list(range(1, NUM_STEPS + 1))
    skipped = [line['step'] for line in steps if line['train/skipped_steps']]
    assert skipped[:2] == [BACK_AT + 1, BACK_AT + 2] and len(skipped) < 5


def test_how_many_steps_the_device_makes_at_a_time_makes_no_difference(rolled_back, tmp_path):
    fit(tmp_path, rollback_after=IN_A_ROW, steps_per_loop=7, log_every_steps=5, keep_checkpoints=1,
        checkpoint_every_secs=1e-9)  # saves by the clock are not gone back to, and do not push out that which is
    assert_equal_bits(tmp_path, rolled_back)


def test_as_if_the_position_had_been_moved_by_hand(rolled_back, tmp_path):
    fit(tmp_path, rollback_after=IN_A_ROW, max_steps=BACK_AT)
    values = tensors(tmp_path)
    values |= {'position': np.int64(FAILED_AT * BATCH), 'guard/rollbacks': np.int64(1)}
    directory = tmp_path / 'checkpoints'
    meta = checkpoint.read_meta(directory / f'ckpt-{BACK_AT:08d}')
    checkpoint.save(directory, BACK_AT, values, {key: meta[key] for key in meta if key != 'sha256'}, keep=1)
    fit(tmp_path, rollback_after=IN_A_ROW)
    assert_equal_bits(tmp_path, rolled_back)


def test_a_run_stopped_among_the_bad_steps_goes_the_same_way(rolled_back, tmp_path):
    fit(tmp_path, rollback_after=IN_A_ROW, max_steps=FAILED_AT - 1)
    assert tensors(tmp_path)['guard/skips_in_a_row'] == IN_A_ROW - 1
    fit(tmp_path, rollback_after=IN_A_ROW)
    assert_equal_bits(tmp_path, rolled_back)
    assert reports(tmp_path) == reports(rolled_back)


def test_it_goes_back_to_the_first_step_and_only_so_often(tmp_path):
    with pytest.raises(ConfigError) as error:
        fit(tmp_path, rollback_after=IN_A_ROW, max_rollbacks=1, bad_steps=range(2, NUM_STEPS))
    assert '\n' not in str(error.value)
    for word in ('train.rollback_after = 3', 'train.max_rollbacks = 1', 'step 3 '):
        assert word in str(error.value)
    assert checkpoint.latest_valid(tmp_path / 'checkpoints').name == 'ckpt-00000000'


def test_a_leap_is_skipped_and_nothing_else(tmp_path):
    for name, settings in (('guarded', {'spike_factor': 5.0, 'rollback_after': 9}), ('not', {})):
        fit(tmp_path / name, leaping_network, [30], **settings)
        skipped = [line['step'] for line in reports(tmp_path / name) if line.get('train/skipped_steps')]
        assert skipped == ([31] if settings else [])
        assert tensors(tmp_path / name)['position'] == NUM_STEPS * BATCH
    norms = {line['step']: line['train/grad_norm'] for line in reports(tmp_path / 'not') if 'train/grad_norm' in line}
    assert norms[31] > 5 * norms[30]
