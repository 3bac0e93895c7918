"""Source and position -> batches, read ahead and decoded in parallel."""
import functools
import os
import re
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from input_pipeline import order
from input_pipeline.preprocess import Crop, checked, decode, make_center_crop, make_random_resized_crop, random_flip
from input_pipeline.sources.idx import encode_png
from input_pipeline.sources.source import IMAGE_STARTS, Source

# Examples read by one call from TensorFlow into Python and decoded by one thread in one go: enough to spread the costs
# of a call, few enough to share a batch among threads.
_MIN_CHUNK = 32
_READS_IN_FLIGHT = 4
_DEFAULT_CROP = make_random_resized_crop()


def train_dataset(source: Source, *, global_batch_size: int, image_size: int = 224, seed: int = 0,
                  start_position: int = 0, shard: int = 0, num_shards: int = 1,
                  crop: Crop = _DEFAULT_CROP, flip: bool = True,
                  on_bad: Callable[[int, int], None] | None = None) -> tf.data.Dataset:
    """Endless batches: rows [shard * B / num_shards, (shard + 1) * B / num_shards) of each global batch of B.

    The example at position p is number `order.permutation(seed, p // N, N)[p % N]` of the source's N; the first is at
    `start_position`. Batches straddle epochs; nothing is dropped. What is random in an example depends on (seed, epoch,
    number) alone: the crop, see `preprocess`, and with `flip` whether it is mirrored. on_bad is called with (position,
    number) of each example that cannot be used, in some thread, before its batch.

    Returns:
      Batches of {'image': uint8 [B', image_size, image_size, 3], 'label': int32 [B'], 'index': int64 [B'] number in the
      source, 'mask': float32 [B'] 0 where the example is bad (and the image black), else 1}, B' = B / num_shards.

    Raises:
      ValueError: the shards do not divide the batch, or an argument is out of range.
    """
    if seed < 0 or start_position < 0:
        raise ValueError(f'seed ({seed}) and start_position ({start_position}) must be at least 0')

    def examples(positions):
        epochs, places = np.divmod(positions, len(source))
        indices, keys = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = order.permutation(seed, int(epoch), len(source))[places[chosen]]
            keys[chosen] = order.epoch_key(seed, int(epoch))
        return indices, np.stack([keys, indices], axis=1)

    def preprocess(encoded, example_seed):
        image = crop(encoded, example_seed, image_size)
        return random_flip(image, example_seed) if flip else image

    return _make_dataset(source, examples, preprocess, start_position, True, global_batch_size, shard, num_shards,
                         on_bad)


def eval_dataset(source: Source, *, global_batch_size: int, image_size: int = 224, resize: int = 256,
                 interpolation: str = 'bicubic', shard: int = 0, num_shards: int = 1,
                 on_bad: Callable[[int, int], None] | None = None) -> tf.data.Dataset:
    """ceil(N / global_batch_size) batches as those of `train_dataset`, with each example once, in order.

    The last one is padded with black images of label 0, index -1 and mask 0. `resize`: pixels of the shorter side
    before the central crop of `image_size`; `interpolation`: 'bicubic' or 'bilinear', antialiased as PIL does.

    Raises:
      ValueError: the shards do not divide the batch, `resize` is below `image_size`, or the interpolation is unknown.
    """
    if resize < image_size:
        raise ValueError(f'eval_dataset: resize ({resize}) must be at least image_size ({image_size})')
    if interpolation not in ('bicubic', 'bilinear'):
        raise ValueError(f"eval_dataset: interpolation must be 'bicubic' or 'bilinear', not {interpolation!r}")
    crop = make_center_crop(resize, interpolation)

    def examples(positions):
        indices = np.where(positions < len(source), positions, -1)
        return indices, np.zeros([len(indices), 2], np.int64)

    return _make_dataset(source, examples, lambda encoded, seed: crop(encoded, seed, image_size), 0, False,
                         global_batch_size, shard, num_shards, on_bad)


def why_bad(source: Source, index: int) -> str:
    """Why this example is masked."""
    if problem := source.problem(index):
        return problem
    encoded, _ = source[index]
    if not encoded.startswith(IMAGE_STARTS):
        return f'no JPEG, PNG, GIF or BMP: it begins with {encoded[:12]!r}' if encoded else 'it is empty'
    try:
        decode(checked(tf.constant(encoded))[0])
    except tf.errors.InvalidArgumentError as error:
        return re.sub(r'\{\{.*?\}\} | \[Op:.*', '', error.message.splitlines()[0])
    return 'it can be decoded, but train_dataset.crop fails on it'


def _make_dataset(source: Source, examples: Callable, preprocess: Callable, start_position: int, is_endless: bool,
                  global_batch_size: int, shard: int, num_shards: int,
                  on_bad: Callable[[int, int], None] | None) -> tf.data.Dataset:
    """`examples(positions)` -> indices (-1: padding) and int64 [n, 2] seeds."""
    if global_batch_size <= 0 or num_shards <= 0 or global_batch_size % num_shards:
        raise ValueError(f'global_batch_size ({global_batch_size}) must be a positive multiple of the number of shards '
                         f'({num_shards})')
    if not 0 <= shard < num_shards:
        raise ValueError(f'shard ({shard}) must be in 0..{num_shards - 1}')
    rows = global_batch_size // num_shards
    chunk = next(size for size in range(min(_MIN_CHUNK, rows), rows + 1) if rows % size == 0)
    chunks_per_batch = rows // chunk
    padding = encode_png(np.zeros([1, 1], np.uint8))

    def read(number):
        batch, part = divmod(int(number), chunks_per_batch)
        positions = start_position + batch * global_batch_size + shard * rows + part * chunk + np.arange(chunk)
        indices, seeds = examples(positions)
        is_real = indices >= 0
        encoded, labels = np.full(chunk, padding, object), np.zeros(chunk, np.int32)
        encoded[is_real], labels[is_real] = source.read(indices[is_real])
        return encoded, seeds, labels, indices, positions

    def read_op(number):
        tensors = tf.numpy_function(read, [number], [tf.string, tf.int64, tf.int32, tf.int64, tf.int64])
        shapes = [chunk], [chunk, 2], [chunk], [chunk], [chunk]
        return [tf.ensure_shape(tensor, shape) for tensor, shape in zip(tensors, shapes)]

    def to_row(encoded, seed, label, index, _):
        mask = tf.cast(index >= 0, tf.float32)
        return {'image': preprocess(encoded, seed), 'label': label, 'index': index, 'mask': mask}

    def to_rows(*examples):
        # An image that cannot be decoded makes its chunk too short: the batch of it is dropped and the next one taken,
        # which decodes each example by itself, with a blank behind it. Good chunks never get there.
        each = tf.data.Dataset.from_tensor_slices(examples)
        fast = each.map(to_row, synchronous=True).batch(chunk, drop_remainder=True).ignore_errors()
        careful = each.flat_map(to_row_or_blank).batch(chunk, drop_remainder=True)
        return fast.concatenate(careful).take(1)

    def to_row_or_blank(*example):
        each = tf.data.Dataset.from_tensors(example)
        row = each.map(to_row).ignore_errors()
        return row.concatenate(each.map(functools.partial(to_blank, row.element_spec['image'].shape))).take(1)

    def to_blank(shape, encoded, seed, label, index, position):
        if on_bad is not None:
            tf.numpy_function(lambda position, index: on_bad(int(position), int(index)), [position, index], [])
        return {'image': tf.zeros(shape, tf.uint8), 'label': label, 'index': index, 'mask': 0.0}

    num_threads = len(os.sched_getaffinity(0))
    num_batches = -(-len(source) // global_batch_size)
    dataset = tf.data.Dataset.range(tf.int64.max if is_endless else num_batches * chunks_per_batch)
    dataset = dataset.map(read_op, num_parallel_calls=_READS_IN_FLIGHT, deterministic=True)
    dataset = dataset.interleave(to_rows, cycle_length=2 * num_threads, num_parallel_calls=num_threads,
                                 deterministic=True)
    dataset = dataset.batch(chunks_per_batch, drop_remainder=True)
    dataset = dataset.map(lambda batch: {key: tf.reshape(x, [rows, *x.shape[2:]]) for key, x in batch.items()})
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.prefetch(2).with_options(options)
