"""What the tests of the step share: small networks, a built trainer, batches, and comparisons.

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
from ghostnet.model import Head
from trainer.optimizer import sgd
from trainer.recipe import Train
from trainer.state import TrainState, build_model_and_state
from trainer.step import distribute, make_normalize, make_train_loop
from trainer.strategy import build_strategy

CLASSES, ROWS, SIZE = 5, 16, 32
LABEL_SMOOTHING = 0.1
NORMALIZE = make_normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
POISON = 255  # a pixel of this value in the corner stands for an example whose gradient is not finite


def small_network():
    """Every kind of layer of GhostNet in two blocks, where tracing the whole network would take too long."""
    x = images = keras.Input((None, None, 3))
    for layer in (ConvBN(8, 3, 2, name='stem'), GhostBottleneck(8, 24, 12, 3, 2, se_hidden=8, name='block_1'),
                  GhostBottleneck(12, 24, 12, name='block_2'), ConvBN(24, name='tail'),
                  keras.layers.GlobalAveragePooling2D(keepdims=True),
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
    settings: Train
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
          optimizer=sgd, all_reduce_dtype='float32', eval_flip=False, **mixing):
    # Strategies of one process use the same keys for their collectives, and fail where these differ in size.
    # TensorFlow's own tests keep them apart in this way; moved on behind it too, for whatever test comes next.
    tf.distribute.MirroredStrategy._collective_key_base += 100_000
    strategy = build_strategy('mirrored' if num_replicas > 1 else 'one_device', num_replicas)
    tf.distribute.MirroredStrategy._collective_key_base += 100_000
    settings = Train(epochs=1, global_batch_size=rows, model=network, optimizer=optimizer, schedule=lambda: None,
                     precision=precision, ema_decay=ema_decay, accumulate=accumulate, label_smoothing=LABEL_SMOOTHING,
                     clip_norm=clip_norm, adaptive_clip=adaptive_clip, sync_batch_norm=sync_batch_norm,
                     all_reduce_dtype=all_reduce_dtype, jit=jit, eval_flip=eval_flip, **mixing)
    model, state, update = build_model_and_state(settings, strategy, CLASSES)
    rng = np.random.default_rng(3)
    for path, variable in state.batch_stats.items():
        low, high = (-0.2, 0.2) if path.endswith('moving_mean') else (0.5, 2)
        variable.assign(rng.uniform(low, high, variable.shape).astype(np.float32))
    loop = make_train_loop(strategy, model, state, settings, normalize=normalize, update_fn=update,
                           schedule=lambda step: tf.constant(0.1))
    return Trainer(strategy, model, settings, state, loop)


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
    one, before_one, sums_one = one_step(network, sync_batch_norm=options.get('sync_batch_norm', False))
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


@functools.cache
def inference(network):
    return functools.partial(in_inference_mode, network)
