"""The step computes the same on any number of replicas, compiled or not, and skips, masks, clips and averages as said.

Gradients are read off the momentum after the first step, where it is the gradient itself.
"""

import functools
from dataclasses import dataclass

import keras
import numpy as np
import pytest
import tensorflow as tf

from ghostnet import ghostnet
from ghostnet.keyed import KeyedDropout
from ghostnet.layers import ConvBN, GhostBottleneck
from ghostnet.model import GlobalAveragePool, Head
from trainer.optimizer import adamw, clip_adaptively, lamb, rmsprop, sgd
from trainer.recipe import Train
from trainer.state import TrainState, build_model_and_state
from trainer.step import distribute, make_eval_loop, make_normalize, make_train_loop
from trainer.strategy import build_strategy

CLASSES, ROWS, SIZE = 5, 16, 32
LABEL_SMOOTHING = 0.1
NORMALIZE = make_normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
POISON = 255  # a pixel of this value in the corner stands for an example whose gradient is not finite


def small_network():
    """Every kind of layer of GhostNet in two blocks, where tracing the whole network would take too long."""
    x = images = keras.Input((None, None, 3))
    for layer in (ConvBN(8, 3, 2, name='stem'), GhostBottleneck(8, 24, 12, 3, 2, se_hidden=8, name='block_1'),
                  GhostBottleneck(12, 24, 12, name='block_2'), ConvBN(24, name='tail'), GlobalAveragePool(),
                  Head(name='head'), KeyedDropout(0.2),
                  keras.layers.Dense(CLASSES, dtype='float32', name='classifier')):
        x = layer(x)
    return keras.Model(images, x)


def whole_network():
    return ghostnet(CLASSES, 0.25, image_size=None)


class InInferenceMode(keras.layers.Layer):
    """The network with moving statistics and without dropout, even in a training step."""

    def __init__(self, network, **kwargs):
        super().__init__(**kwargs)
        self.network = network

    def call(self, images):
        return self.network(images, training=False)

    def compute_output_spec(self, images):
        return self.network.compute_output_spec(images)


def in_inference_mode(make_network):
    images = keras.Input((None, None, 3))
    return keras.Model(images, InInferenceMode(make_network())(images))


def poisonable_network():
    """Logits, and with them loss and gradient but no statistic, are NaN for a poisoned image."""
    class Poison(keras.layers.Layer):
        def call(self, logits, images):
            return tf.where(images[:, :1, 0, 0] == POISON, float('nan'), 1.0) * logits

    network = small_network()
    return keras.Model(network.input, Poison(dtype='float32')(network.output, network.input))


@dataclass
class Trainer:
    """A train loop and what it works on."""

    strategy: tf.distribute.Strategy
    model: keras.Model
    state: TrainState
    loop: tf.types.experimental.PolymorphicFunction

    def run(self, *batches):
        """One step for each global batch; the sums."""
        dataset = {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}
        iterator = iter(distribute(self.strategy, lambda **shard: tf.data.Dataset.from_tensor_slices(dataset)))
        return {name: float(value) for name, value in self.loop(iterator, tf.constant(len(batches))).items()}

    def values(self, prefix=''):
        return {name: v.numpy() for name, v in self.state.variables().items() if name.startswith(prefix)}

    def gradient(self):
        return vector(self.values('slots/momentum/'))


def build(network=small_network, num_replicas=1, *, rows=ROWS, normalize=NORMALIZE, precision='float32',
          ema_decay=None, jit=False, sync_batch_norm=False, clip_norm=None, adaptive_clip=None, accumulate=1,
          optimizer=sgd, all_reduce_dtype='float32'):
    # Strategies of one process use the same keys for their collectives, and fail where these differ in size.
    # TensorFlow's own tests keep them apart in this way; moved on behind it too, for whatever test comes next.
    tf.distribute.MirroredStrategy._collective_key_base += 100_000
    strategy = build_strategy('mirrored' if num_replicas > 1 else 'one_device', num_replicas)
    tf.distribute.MirroredStrategy._collective_key_base += 100_000
    settings = Train(epochs=1, global_batch_size=rows, model=network, optimizer=optimizer, schedule=lambda: None,
                     precision=precision, ema_decay=ema_decay)
    model, state, update = build_model_and_state(settings, strategy, CLASSES)
    rng = np.random.default_rng(3)
    for path, variable in state.batch_stats.items():
        low, high = (-0.2, 0.2) if path.endswith('moving_mean') else (0.5, 2)
        variable.assign(rng.uniform(low, high, variable.shape).astype(np.float32))
    loop = make_train_loop(strategy, model, state, normalize=normalize, update_fn=update,
                           schedule=lambda step: tf.constant(0.1), global_batch_size=rows, seed=0,
                           accumulate=accumulate, label_smoothing=LABEL_SMOOTHING, clip_norm=clip_norm,
                           adaptive_clip=adaptive_clip, ema_decay=ema_decay, sync_batch_norm=sync_batch_norm,
                           all_reduce_dtype=all_reduce_dtype, jit=jit)
    return Trainer(strategy, model, state, loop)


def make_batch(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    return {'image': rng.integers(0, 251, (rows, SIZE, SIZE, 3), np.uint8),
            'label': rng.integers(0, CLASSES, rows).astype(np.int32), 'index': np.arange(rows),
            'mask': np.ones(rows, np.float32)}


def vector(tensors):
    return np.concatenate([np.ravel(t).astype(np.float64) for t in tensors.values()])


def relative_difference(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def assert_same_bits(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, others[name], err_msg=name)


def replica_values(trainer):
    """{name: its value on each replica}."""
    return {name: [v.numpy() for v in trainer.strategy.experimental_local_results(variable)]
            for name, variable in trainer.state.variables().items()}


@functools.cache
def one_step(network, num_replicas=1, **options):
    """What a build has after one step, and the sums of that step."""
    trainer = build(network, num_replicas, **options)
    before = trainer.values()
    sums = trainer.run(make_batch())
    return trainer, before, sums


def assert_same_step(network, num_replicas, **options):
    one, before_one, sums_one = one_step(network)
    some, before, sums = one_step(network, num_replicas, **options)
    assert_same_bits(before, before_one)
    assert np.linalg.norm(one.gradient()) > 0.1
    assert relative_difference(some.gradient(), one.gradient()) < 1e-5
    np.testing.assert_allclose(vector(some.values('batch_stats/')), vector(one.values('batch_stats/')), atol=1e-5)
    assert (sums['examples'], sums['top1'], sums['top5']) == (ROWS, sums_one['top1'], sums_one['top5'])
    for name in ('loss', 'grad_norm'):
        assert sums[name] == pytest.approx(sums_one[name], rel=1e-5)
    for name, values in replica_values(some).items():
        for value in values:
            np.testing.assert_array_equal(value, values[0], err_msg=name)


# Replicas

@pytest.mark.parametrize(('network', 'num_replicas'), [(small_network, 2), (small_network, 4), (whole_network, 2)])
def test_replicas_with_synchronised_batch_norm_compute_what_one_computes(network, num_replicas):
    assert_same_step(network, num_replicas, sync_batch_norm=True)


def test_gradients_that_are_summed_in_bfloat16_are_rounded_and_the_same_everywhere():
    exact, _, _ = one_step(small_network, 2)
    rounded, _, sums = one_step(small_network, 2, all_reduce_dtype='bfloat16')
    # 8 bits: each addend and the sum are off by up to 2**-9 of themselves.
    assert 1e-4 < relative_difference(rounded.gradient(), exact.gradient()) < 2**-8
    assert sums['examples'] == ROWS
    assert_same_bits(rounded.values('batch_stats/'), exact.values('batch_stats/'))
    for name, values in replica_values(rounded).items():
        np.testing.assert_array_equal(values[0], values[1], err_msg=name)


@functools.cache
def inference(network):
    return functools.partial(in_inference_mode, network)


@pytest.mark.parametrize(('network', 'num_replicas'), [(small_network, 4), (whole_network, 2)])
def test_replicas_with_batch_norm_in_inference_mode_compute_what_one_computes(network, num_replicas):
    assert_same_step(inference(network), num_replicas)
    trainer, before, _ = one_step(inference(network), num_replicas)
    assert_same_bits(trainer.values('batch_stats/'), {k: v for k, v in before.items() if k.startswith('batch_stats/')})


@pytest.mark.parametrize('network', [small_network, whole_network])
def test_gradient_is_that_of_the_mean_loss_by_keras(network):
    trainer, before, sums = one_step(inference(network))
    trainer = build(inference(network))
    batch = make_batch()
    loss_of = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=LABEL_SMOOTHING)
    with tf.GradientTape() as tape:
        logits = trainer.model(NORMALIZE(batch['image']))
        loss = loss_of(tf.one_hot(batch['label'], CLASSES), logits)
    gradient = tape.gradient(loss, trainer.state.params)
    assert relative_difference(one_step(inference(network))[0].gradient(), vector(gradient)) < 1e-5
    assert sums['loss'] / ROWS == pytest.approx(float(loss), rel=1e-5)
    assert sums['top1'] == np.sum(np.argmax(logits, 1) == batch['label'])


def test_without_synchronising_all_replicas_hold_the_mean_of_their_statistics():
    trainer, _, _ = one_step(small_network, 4, ema_decay=0.9)
    batch, quarter = make_batch(), ROWS // 4
    each = []
    alone = build(rows=quarter)
    initial = alone.values()
    for i in range(4):
        alone.state.restore(initial)
        alone.run({key: value[i * quarter:(i + 1) * quarter] for key, value in batch.items()})
        each.append(vector(alone.values('batch_stats/')))
    assert np.ptp(each, axis=0).max() > 0.01
    for name, values in replica_values(trainer).items():
        assert len(values) == (4 if '/' in name else len(values))
        for value in values:
            np.testing.assert_array_equal(value, values[0], err_msg=name)
    np.testing.assert_allclose(vector(trainer.values('batch_stats/')), np.mean(each, axis=0), rtol=1e-5, atol=1e-6)


# Accumulation: parts of a batch, one after the other or one a core

@pytest.mark.parametrize(('num_replicas', 'accumulate'), [(1, 4), (2, 2)])
def test_four_parts_in_inference_mode_compute_what_the_batch_computes(num_replicas, accumulate):
    assert_same_step(inference(small_network), num_replicas, accumulate=accumulate)


@pytest.mark.parametrize(('num_replicas', 'options'), [(1, {}), (2, {}), (1, {'jit': True}), (2, {'jit': True})])
def test_four_parts_compute_what_four_replicas_compute(num_replicas, options):
    """Batch norm takes statistics by the part, as it does by the replica; dropout goes by the row of the batch."""
    replicas, before, sums_replicas = one_step(small_network, 4, ema_decay=0.9)
    parts, before_parts, sums = one_step(small_network, num_replicas, ema_decay=0.9, accumulate=4 // num_replicas,
                                         **options)
    assert_same_bits(before_parts, before)
    assert relative_difference(parts.gradient(), replicas.gradient()) < 1e-5
    for prefix in ('params/', 'batch_stats/', 'ema/'):
        assert relative_difference(vector(parts.values(prefix)), vector(replicas.values(prefix))) < 1e-5
    assert (sums['examples'], sums['top1']) == (ROWS, sums_replicas['top1'])
    for name in ('loss', 'grad_norm'):
        assert sums[name] == pytest.approx(sums_replicas[name], rel=1e-5)


@pytest.mark.parametrize(('num_replicas', 'flip'), [(1, True), (2, False), (4, False)])
def test_evaluation_counts_each_example_once(num_replicas, flip):
    trainer = build(num_replicas=num_replicas)
    batches = [make_batch(1), make_batch(2)]
    batches[1]['mask'][5:] = 0
    batches[1]['image'][5:], batches[1]['label'][5:] = 0, 0
    loop = make_eval_loop(trainer.strategy, trainer.model, *trainer.state.weights('raw'), normalize=NORMALIZE,
                          flip=flip, jit=False)
    iterator = iter(distribute(trainer.strategy, lambda **shard: tf.data.Dataset.from_tensor_slices(
        {key: np.stack([batch[key] for batch in batches]) for key in batches[0]})))
    sums = {name: float(value) for name, value in loop(iterator, tf.constant(2)).items()}
    images = np.concatenate([batches[0]['image'], batches[1]['image'][:5]])
    labels = np.concatenate([batches[0]['label'], batches[1]['label'][:5]])
    logits = trainer.model(NORMALIZE(images), training=False)
    if flip:
        logits = (logits + trainer.model(NORMALIZE(images[:, :, ::-1]), training=False)) / 2
    assert sums['examples'] == ROWS + 5
    assert sums['loss'] == pytest.approx(float(tf.reduce_sum(
        keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True))), rel=1e-5)
    assert sums['top1'] == np.sum(np.argmax(logits, 1) == labels)
    assert sums['top5'] == ROWS + 5


# XLA

@pytest.mark.parametrize('num_replicas', [1, 2])
def test_compiled_and_not_compiled_agree(num_replicas):
    plain, before, plain_sums = one_step(small_network, num_replicas, ema_decay=0.9)
    compiled, before_compiled, sums = one_step(small_network, num_replicas, ema_decay=0.9, jit=True)
    assert_same_bits(before_compiled, before)
    assert relative_difference(compiled.gradient(), plain.gradient()) < 1e-5
    for prefix in ('params/', 'batch_stats/', 'ema/'):
        assert relative_difference(vector(compiled.values(prefix)), vector(plain.values(prefix))) < 1e-5
    assert sums['top1'] == plain_sums['top1']
    assert sums['loss'] == pytest.approx(plain_sums['loss'], rel=1e-5)


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
