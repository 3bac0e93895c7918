"""What a training step hands to the layers it calls, and the randomness that they and all on the device draw."""
import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf


class StepContext(NamedTuple):
    """What the layers of one training step share."""

    row_keys: tf.Tensor | None = None  # uint32 [B], of each row's dropout mask. None: TensorFlow's own generator draws
    # float32 tensor -> its differentiable mean over num_replicas. None: batch norm takes statistics of these rows only.
    cross_replica_mean: Callable[[tf.Tensor], tf.Tensor] | None = None
    num_replicas: int = 1
    momentum: float | None = None  # of batch norm's moving statistics, 0 leaving the batch's. None: the layers' own


_OUTSIDE = StepContext()
_context = contextvars.ContextVar('ghostnet_step_context', default=_OUTSIDE)
current_step = _context.get  # what the enclosing `step_context` gave; the defaults outside of any


@contextlib.contextmanager
def step_context(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Gives StepContext(*args, **kwargs) to the layers called inside."""
    token = _context.set(StepContext(*args, **kwargs))
    try:
        yield
    finally:
        _context.reset(token)


def mix_bits(x: tf.Tensor) -> tf.Tensor:
    """A bijection of uint32 in which every input bit changes every output bit about half of the time.

    Source: the finaliser of MurmurHash3 (Appleby). The same bits on every device, with and without XLA.
    """
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ tf.bitwise.right_shift(x, tf.constant(shift, tf.uint32))) * tf.constant(factor, tf.uint32)
    return x ^ tf.bitwise.right_shift(x, tf.constant(16, tf.uint32))


def row_keys(seed: int, step: tf.Tensor, first_row: tf.Tensor, num_rows: int) -> tf.Tensor:
    """uint32 [num_rows]: keys of rows first_row ... of the *global* batch, whatever replica they are on.

    Of any Python integer as seed the low 32 bits count; step and first_row are int scalars.
    """
    key = mix_bits(tf.constant(seed & 0xFFFFFFFF, tf.uint32) + tf.constant(0x9E3779B9, tf.uint32))
    key = mix_bits(key ^ tf.cast(step, tf.uint32))
    rows = tf.cast(tf.cast(first_row, tf.int32) + tf.range(num_rows), tf.uint32)
    return mix_bits(mix_bits(rows + tf.constant(0x7F4A7C15, tf.uint32)) ^ key)


def keyed_uniform(keys: tf.Tensor, num_elements: int) -> tf.Tensor:
    """float32 [len(keys), num_elements], uniform in [0, 1): a pure function of (key, element)."""
    elements = mix_bits(tf.cast(tf.range(num_elements), tf.uint32) * tf.constant(0x9E3779B9, tf.uint32))
    bits = mix_bits(mix_bits(keys[:, tf.newaxis] ^ elements[tf.newaxis, :]) + keys[:, tf.newaxis])
    return tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32)), tf.float32) * 2.0**-24


@keras.saving.register_keras_serializable('ghostnet')
class KeyedDropout(keras.layers.Layer):
    """Dropout on [B, C] whose mask depends on the row's key alone; outside of `step_context` TensorFlow draws it."""

    def __init__(self, rate: float, **kwargs):
        super().__init__(**kwargs)
        if not (isinstance(rate, int | float) and 0 <= rate < 1):
            raise ValueError(f'dropout is {rate!r}; it must be a number in [0, 1)')
        self.rate = rate

    def call(self, x, training=False):
        if not training or not self.rate:
            return x
        keys = current_step().row_keys
        uniform = tf.random.uniform(tf.shape(x)) if keys is None else keyed_uniform(keys, x.shape[-1])
        return x * tf.cast(uniform >= self.rate, x.dtype) / tf.cast(1 - self.rate, x.dtype)
