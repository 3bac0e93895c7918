"""The step skips, masks, clips and rounds as said, with every optimizer, and is traced once."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from step_harness import (
    NORMALIZE,
    POISON,
    ROWS,
    assert_same_bits,
    build,
    inference,
    make_batch,
    one_step,
    poisonable_network,
    relative_difference,
    replica_values,
    small_network,
    vector,
)

from trainer.optimizer import adamw, clip_adaptively, lamb, rmsprop

# Steps that are skipped, rows that do not count

@pytest.mark.parametrize('num_replicas', [1, 4])
def test_a_gradient_that_is_not_finite_on_any_replica_skips_the_step_on_all(num_replicas):
    trainer = build(poisonable_network, num_replicas, ema_decay=0.9,
                    normalize=lambda images: tf.cast(images, tf.float32))
    trainer.run(make_batch(8))
    for replica in range(num_replicas):
        before = replica_values(trainer)
        poisoned = make_batch(9)
        poisoned['image'][replica * ROWS // num_replicas + 1, 0, 0] = POISON
        sums = trainer.run(poisoned)
        assert (sums['skipped'], sums['seen']) == (1, ROWS)
        assert all(sums[name] == 0 for name in ('examples', 'loss', 'top1', 'grad_norm'))
        for name, values in replica_values(trainer).items():
            change = {'step': 1, 'position': ROWS}.get(name, 0)
            for value, old in zip(values, before[name]):
                np.testing.assert_array_equal(value, old + change, err_msg=name)
    before = trainer.values()
    sums = trainer.run(make_batch(9))
    assert sums['skipped'] == 0 and sums['grad_norm'] > 0
    after = trainer.values()
    assert all(np.isfinite(value).all() for value in after.values())
    assert all((after[name] != value).any() for name, value in before.items() if name.endswith('kernel'))


def test_statistics_that_are_not_finite_skip_the_step_too():
    trainer = build(normalize=lambda images: tf.where(images == POISON, float('inf'), tf.cast(images, tf.float32)))
    poisoned = make_batch()
    poisoned['image'][3, 5, 5] = POISON
    before = trainer.values()
    assert trainer.run(poisoned)['skipped'] == 1
    assert_same_bits(trainer.values(), before | {'step': np.int64(1), 'position': np.int64(ROWS)})


def test_masked_rows_do_not_count_in_loss_gradient_or_metrics():
    few, num_few = make_batch(1), 11
    batches = []
    for seed in (2, 3):
        batch = make_batch(seed)
        for key in ('image', 'label'):
            batch[key][:num_few] = few[key][:num_few]
        batch['mask'][num_few:] = 0
        batches.append(batch)
    alone = build(inference(small_network), rows=num_few)
    sums_alone = alone.run({key: value[:num_few] for key, value in few.items()})
    for num_replicas in (1, 2):
        trainer = build(inference(small_network), num_replicas)
        initial = trainer.values()
        for batch in batches:
            trainer.state.restore(initial)
            sums = trainer.run(batch)
            assert sums['examples'] == num_few
            assert sums['top1'] == sums_alone['top1']
            assert sums['loss'] == pytest.approx(sums_alone['loss'], rel=1e-5)
            # Divided by the rows of the batch, masked or not.
            assert relative_difference(trainer.gradient() * ROWS, alone.gradient() * num_few) < 1e-5


# Clipping, precision, tracing

def test_clipping_takes_the_norm_of_the_whole_gradient():
    whole, _, sums = one_step(small_network, 2, ema_decay=0.9)
    clip_norm = 0.25 * sums['grad_norm']
    clipped, _, clipped_sums = one_step(small_network, 2, clip_norm=clip_norm)
    wanted, norm = tf.clip_by_global_norm([tf.constant(v) for v in whole.values('slots/').values()], clip_norm)
    assert clipped_sums['grad_norm'] == pytest.approx(float(norm), rel=1e-5)
    np.testing.assert_allclose(clipped.gradient(), vector(dict(enumerate(wanted))), rtol=1e-5, atol=1e-9)
    loose, _, _ = one_step(small_network, 2, clip_norm=2 * sums['grad_norm'])
    assert_same_bits(loose.values('slots/'), whole.values('slots/'))


def test_adaptive_clipping_takes_the_gradient_of_the_global_batch():
    whole, before, sums = one_step(small_network, 2, ema_decay=0.9)
    clipped, _, clipped_sums = one_step(small_network, 2, adaptive_clip=0.01)
    params = {path: tf.constant(before[f'params/{path}']) for path in whole.state.params}
    gradient = {path: tf.constant(v.numpy()) for path, v in whole.state.slots['momentum'].items()}
    wanted = clip_adaptively(gradient, params, 0.01)
    assert clipped_sums['grad_norm'] == pytest.approx(sums['grad_norm'], rel=1e-5)  # that before the clipping
    np.testing.assert_allclose(clipped.gradient(), vector(wanted), rtol=1e-4, atol=1e-9)
    assert relative_difference(clipped.gradient(), vector(gradient)) > 0.01


@pytest.mark.parametrize('optimizer', [rmsprop, adamw, lamb])
def test_every_optimizer_runs_in_the_step(optimizer):
    """As it does by itself: what the step adds is the order of things, the rate and the number of the step."""
    plain, before, _ = one_step(small_network)  # its momentum is the gradient
    trainer, _, _ = one_step(small_network, optimizer=optimizer)
    init, update = optimizer()
    params = {path: tf.constant(before[f'params/{path}']) for path in plain.state.params}
    gradient = {path: tf.constant(v.numpy()) for path, v in plain.state.slots['momentum'].items()}
    wanted, slots = update(gradient, init(params), params, tf.constant(0.1), tf.constant(0, tf.int64))
    assert relative_difference(vector(trainer.values('params/')), vector(wanted)) < 1e-6
    assert relative_difference(vector(trainer.values('params/')), vector(params)) > 1e-3
    for slot, tensors in slots.items():
        assert relative_difference(vector(trainer.values(f'slots/{slot}/')), vector(tensors)) < 1e-6


def test_mixed_precision_keeps_variables_statistics_and_logits_in_float32():
    mixed, before, sums = one_step(small_network, 2, precision='mixed_bfloat16')
    plain, before_plain, plain_sums = one_step(small_network, 2, ema_decay=0.9)
    assert mixed.model.get_layer('stem').compute_dtype == 'bfloat16'
    assert keras.config.dtype_policy().name == 'float32'
    for name, value in mixed.values().items():
        assert value.dtype == (np.float32 if '/' in name else np.int64), name
    logits, _ = mixed.model.stateless_call(list(mixed.state.params.values()), list(mixed.state.batch_stats.values()),
                                           NORMALIZE(make_batch()['image']), training=True)
    assert logits.dtype == tf.float32
    assert_same_bits(before, {name: value for name, value in before_plain.items() if not name.startswith('ema/')})
    assert sums['loss'] == pytest.approx(plain_sums['loss'], rel=0.02)
    assert 0 < relative_difference(mixed.gradient(), plain.gradient()) < 0.1
    difference = np.abs(vector(mixed.values('batch_stats/')) - vector(plain.values('batch_stats/')))
    assert 0 < difference.max() < 0.05


@pytest.mark.parametrize('num_replicas', [1, 2])
def test_float16_computes_what_float32_does_whatever_the_scale(num_replicas):
    plain, _, plain_sums = one_step(small_network, num_replicas, ema_decay=0.9)
    for scale in (2.0**8, 2.0**13):
        half = build(num_replicas=num_replicas, precision='mixed_float16')
        half.state.loss_scale['loss_scale'].assign(scale)
        sums = half.run(make_batch())
        assert half.model.get_layer('stem').compute_dtype == 'float16'
        assert sums['skipped'] == 0
        assert sums['loss'] == pytest.approx(plain_sums['loss'], rel=0.005)
        assert sums['grad_norm'] == pytest.approx(plain_sums['grad_norm'], rel=0.02)
        assert 0 < relative_difference(half.gradient(), plain.gradient()) < 0.02
        assert {name: float(v) for name, v in half.values('loss_scale').items()} == {
            'loss_scale': scale, 'loss_scale_steps': 1}


@pytest.mark.parametrize('num_replicas', [1, 4])
def test_a_gradient_too_large_for_float16_on_any_replica_halves_the_scale_on_all(num_replicas):
    trainer = build(poisonable_network, num_replicas, precision='mixed_float16',
                    normalize=lambda images: tf.cast(images, tf.float32))
    trainer.state.loss_scale['loss_scale'].assign(64.0)
    for replica in range(num_replicas):
        before = replica_values(trainer)
        poisoned = make_batch(9)
        poisoned['image'][replica * ROWS // num_replicas + 1, 0, 0] = POISON
        assert trainer.run(poisoned)['skipped'] == 1
        after = replica_values(trainer)
        for name, values in after.items():
            for value, old in zip(values, before[name]):
                wanted = {'step': old + 1, 'position': old + ROWS, 'loss_scale': old / 2, 'loss_scale_steps': 0}
                np.testing.assert_array_equal(value, wanted.get(name, old), err_msg=name)
    assert trainer.run(make_batch(9))['skipped'] == 0


def test_any_number_of_steps_runs_the_one_trace():
    trainer = build()
    for num_steps in (1, 2, 3):
        trainer.run(*[make_batch(seed) for seed in range(num_steps)])
    assert trainer.loop.experimental_get_tracing_count() == 1
    assert int(trainer.state.step) == 6 and int(trainer.state.position) == 6 * ROWS
