"""The step computes the same on any number of replicas, in any number of parts, compiled or not."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from step_harness import (
    CLASSES,
    LABEL_SMOOTHING,
    NORMALIZE,
    ROWS,
    SIZE,
    assert_same_bits,
    assert_same_step,
    build,
    inference,
    make_batch,
    one_step,
    relative_difference,
    replica_values,
    small_network,
    vector,
    whole_network,
)

from ghostnet.layers import ConvBN
from trainer.optimizer import adamw, lamb, rmsprop, sgd
from trainer.step import distribute, make_estimate_loop, make_eval_loop
from trainer.strategy import build_strategy, has_accelerator

# Replicas

@pytest.mark.parametrize(('network', 'num_replicas'), [
    (small_network, 2), (small_network, 4), pytest.param(whole_network, 2, marks=pytest.mark.long)])
def test_replicas_with_synchronised_batch_norm_compute_what_one_computes(network, num_replicas):
    assert_same_step(network, num_replicas, sync_batch_norm=True)


@pytest.mark.parametrize('network', [small_network, pytest.param(whole_network, marks=pytest.mark.long)])
def test_synchronised_batch_norm_computes_what_the_fused_kernel_computes(network):
    """As near as that kernel's sums of all rows allow."""
    fused, _, sums_fused = one_step(network)
    synchronised, _, sums = one_step(network, sync_batch_norm=True)
    assert relative_difference(synchronised.gradient(), fused.gradient()) < 1e-4
    assert relative_difference(vector(synchronised.values('batch_stats/')), vector(fused.values('batch_stats/'))) < 1e-5
    assert sums['loss'] == pytest.approx(sums_fused['loss'], rel=1e-5)


def test_gradients_that_are_summed_in_bfloat16_are_rounded_and_the_same_everywhere():
    exact, _, _ = one_step(small_network, 2)
    rounded, _, sums = one_step(small_network, 2, all_reduce_dtype='bfloat16')
    # 8 bits: each addend and the sum are off by up to 2**-9 of themselves.
    assert 1e-4 < relative_difference(rounded.gradient(), exact.gradient()) < 2**-8
    assert sums['examples'] == ROWS
    assert_same_bits(rounded.values('batch_stats/'), exact.values('batch_stats/'))
    for name, values in replica_values(rounded).items():
        np.testing.assert_array_equal(values[0], values[1], err_msg=name)

@pytest.mark.parametrize(('network', 'num_replicas'), [
    (small_network, 4), pytest.param(whole_network, 2, marks=pytest.mark.long)])
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


def test_all_replicas_run_the_one_trace():
    traces = []

    def normalize(images):
        traces.append(images.device)
        return NORMALIZE(images)

    build(num_replicas=4, normalize=normalize).run(make_batch())
    assert traces == ['']  # for no device


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


@pytest.mark.parametrize(('num_replicas', 'options'), [
    (1, {}), (2, {}), (1, {'jit': True}), pytest.param(2, {'jit': True}, marks=pytest.mark.long)])
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


def large_network():
    """10 million parameters: more than TensorFlow's planning of memory takes to be there on a CPU."""
    images = keras.Input((None, None, 3))
    x = keras.layers.GlobalAveragePooling2D()(ConvBN(8, 3, 2, name='stem')(images))
    for i in range(2):
        x = keras.layers.Dense(3000, activation='relu', name=f'dense{i}')(x)
    return keras.Model(images, keras.layers.Dense(CLASSES, dtype='float32', name='classifier')(x))


@pytest.mark.parametrize('optimizer', [sgd, adamw, lamb, rmsprop])
def test_parts_of_a_large_network_train_step_after_step(optimizer):
    trainer = build(large_network, optimizer=optimizer, accumulate=2)
    for _ in range(3):
        assert np.isfinite(trainer.run(make_batch(), make_batch(1))['loss'])


# Mixup, CutMix and random erasing

@pytest.mark.parametrize(('num_replicas', 'options'), [(2, {'accumulate': 2}), (4, {}), (1, {'jit': True})])
def test_what_is_mixed_and_erased_depends_on_neither_replicas_nor_parts_nor_xla(num_replicas, options):
    mixing = {'mixup_alpha': 1.0, 'cutmix_alpha': 1.0, 'erase_probability': 0.5}
    plain, _, _ = one_step(inference(small_network))
    one, _, sums_one = one_step(inference(small_network), **mixing)
    some, _, sums = one_step(inference(small_network), num_replicas, **mixing, **options)
    assert relative_difference(one.gradient(), plain.gradient()) > 0.1
    assert relative_difference(some.gradient(), one.gradient()) < 1e-5
    assert sums['loss'] == pytest.approx(sums_one['loss'], rel=1e-5)
    assert (sums['examples'], sums['top1']) == (ROWS, sums_one['top1'])


@pytest.mark.parametrize(('num_replicas', 'flip'), [(1, True), (2, False), (4, False)])
def test_evaluation_counts_each_example_once(num_replicas, flip):
    trainer = build(num_replicas=num_replicas, eval_flip=flip)
    batches = [make_batch(1), make_batch(2)]
    batches[1]['mask'][5:] = 0
    batches[1]['image'][5:], batches[1]['label'][5:] = 0, 0
    loop = make_eval_loop(trainer.strategy, trainer.model, trainer.settings, NORMALIZE, *trainer.state.weights('raw'))
    iterator = iter(distribute(trainer.strategy, lambda **shard: tf.data.Dataset.from_tensor_slices(
        {key: np.stack([batch[key] for batch in batches]) for key in batches[0]})))
    sums = loop(iterator, [1, 1])
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


@pytest.mark.parametrize('num_replicas', [1, 2])
def test_statistics_that_are_taken_anew_are_those_of_all_rows(num_replicas):
    """Of the first layer, whose inputs depend on no other statistics: by NumPy from its convolution's outputs."""
    trainer = build(num_replicas=num_replicas)
    batches = [make_batch(1), make_batch(2), make_batch(3)]
    before = trainer.values('batch_stats/')
    with trainer.strategy.scope():
        estimated = {path: tf.Variable(v, trainable=False) for path, v in trainer.state.batch_stats.items()}
    loop = make_estimate_loop(trainer.strategy, trainer.model, trainer.settings, NORMALIZE, trainer.state.params,
                              estimated)
    distributed = distribute(trainer.strategy, lambda **shard: tf.data.Dataset.from_tensor_slices(
        {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}))

    def stopped():
        yield 1
        raise InterruptedError

    with pytest.raises(InterruptedError):
        loop(iter(distributed), 3, stopped())
    assert_same_bits({f'batch_stats/{path}': v.numpy() for path, v in estimated.items()}, before)
    loop(iter(distributed), 3, [1, 2])
    stem = trainer.model.get_layer('stem').conv
    outputs = np.concatenate([stem(NORMALIZE(batch['image'])) for batch in batches]).astype(np.float64)
    # Each batch on each replica has the unbiased variance of its own count.
    count = ROWS // num_replicas * (SIZE // 2) ** 2
    parts = outputs.reshape(3 * num_replicas, count, -1)
    np.testing.assert_allclose(estimated['stem/bn/moving_mean'].numpy(), outputs.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(estimated['stem/bn/moving_variance'].numpy(),
                               parts.var(1, ddof=1).mean(0) + parts.mean(1).var(0), rtol=1e-4)
    assert all(not np.allclose(v.numpy(), before[f'batch_stats/{path}']) for path, v in estimated.items())
    assert_same_bits(trainer.values('batch_stats/'), before)


@pytest.mark.parametrize(('name', 'num_devices'), [('one_device', None), ('mirrored', 2)])
def test_one_cpu_takes_the_dataset_as_it_is(name, num_devices):
    """Iterators for devices have a thread of TensorFlow's, which the dataset cannot switch off: see test_dataset."""
    dataset = tf.data.Dataset.range(8).map(lambda i: {'mask': tf.ones([4]) * tf.cast(i, tf.float32)})
    given = []
    batches = distribute(build_strategy(name, num_devices), lambda **shard: given.append(shard) or dataset)
    assert (batches is dataset) == (name == 'one_device')
    assert given == [{'shard': 0, 'num_shards': 1}]


def test_grappler_is_off_on_a_cpu():
    build()
    assert tf.config.optimizer.get_experimental_options()['disable_meta_optimizer'] == (not has_accelerator())


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
