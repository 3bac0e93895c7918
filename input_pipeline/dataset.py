"""Source and position -> batches, read ahead and decoded in parallel."""
import os
from collections.abc import Callable, Iterable

import numpy as np
import tensorflow as tf

from input_pipeline import order
from input_pipeline.preprocess import Crop, checked, decode, make_center_crop, make_random_resized_crop, random_flip
from input_pipeline.sources.idx import encode_png
from input_pipeline.sources.source import Source

# Examples read by one call from TensorFlow into Python and decoded by one thread in one go: enough to spread the costs
# of a call, few enough to share a batch among threads.
_MIN_CHUNK = 32
_READS_IN_FLIGHT = 4
_DEFAULT_CROP = make_random_resized_crop()


def train_dataset(source: Source, *, global_batch_size: int, image_size: int = 224, seed: int = 0,
                  start_position: int = 0, shard: int = 0, num_shards: int = 1,
                  crop: Crop = _DEFAULT_CROP, flip: bool = True) -> tf.data.Dataset:
    """Endless batches from `start_position` on: the rows of shard `shard` of each global batch.

    The example at position p is number `order.permutation(seed, p // N, N)[p % N]` of the source's N. Batches straddle
    epochs; nothing is dropped. What is random in an example depends on (seed, epoch, number) alone.

    Args:
      source: what `open_source` or `array_source` gave.
      global_batch_size: rows of all shards together.
      image_size: height and width of the images in pixels.
      seed: at least 0.
      start_position: number of examples that the run has already seen.
      shard, num_shards: rows [shard * B / num_shards, (shard + 1) * B / num_shards) of each global batch of B.
      crop: see `preprocess`.
      flip: whether every second image is mirrored at random.

    Returns:
      Batches of {'image': uint8 [B', image_size, image_size, 3], 'label': int32 [B'], 'index': int64 [B'] number in the
      source, 'mask': float32 [B'] 0 where the image cannot be decoded (and is black), else 1}, B' = B / num_shards.

    Raises:
      ValueError: the shards do not divide the batch, or an argument is out of range.
    """
    rows = _shard_rows(global_batch_size, shard, num_shards)
    if seed < 0 or start_position < 0:
        raise ValueError(f'seed ({seed}) and start_position ({start_position}) must be at least 0')

    def examples(positions):
        epochs, places = np.divmod(start_position + positions, len(source))
        indices, keys = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = order.permutation(seed, int(epoch), len(source))[places[chosen]]
            keys[chosen] = order.epoch_key(seed, int(epoch))
        return indices, np.stack([keys, indices], axis=1)

    def preprocess(encoded, example_seed):
        image = crop(encoded, example_seed, image_size)
        return random_flip(image, example_seed) if flip else image

    return _make_dataset(source, examples, preprocess, None, global_batch_size, rows)


def eval_dataset(source: Source, *, global_batch_size: int, image_size: int = 224, resize: int = 256,
                 interpolation: str = 'bicubic', shard: int = 0, num_shards: int = 1) -> tf.data.Dataset:
    """ceil(N / global_batch_size) batches with each example once, in order; the last one is padded.

    Args:
      resize: pixels of the shorter side before the central crop of `image_size`.
      interpolation: 'bicubic' or 'bilinear', antialiased as PIL does.
      Others: as in `train_dataset`.

    Returns:
      Batches as in `train_dataset`. Padding is a black image with label 0, index -1 and mask 0.

    Raises:
      ValueError: the shards do not divide the batch, `resize` is below `image_size`, or the interpolation is unknown.
    """
    rows = _shard_rows(global_batch_size, shard, num_shards)
    if resize < image_size:
        raise ValueError(f'eval_dataset: resize ({resize}) must be at least image_size ({image_size})')
    if interpolation not in ('bicubic', 'bilinear'):
        raise ValueError(f"eval_dataset: interpolation must be 'bicubic' or 'bilinear', not {interpolation!r}")
    crop = make_center_crop(resize, interpolation)

    def examples(positions):
        indices = np.where(positions < len(source), positions, -1)
        return indices, np.zeros([len(indices), 2], np.int64)

    return _make_dataset(source, examples, lambda encoded, seed: crop(encoded, seed, image_size),
                         -(-len(source) // global_batch_size), global_batch_size, rows)


def first_undecodable(source: Source, indices: Iterable[int]) -> tuple[int, str] | None:
    """(index, reason) of the first of these examples that is masked because it cannot be decoded, if one is."""
    @tf.function
    def check(encoded: tf.Tensor):
        encoded, _, _ = checked(encoded)
        return tf.shape(decode(encoded))

    for index in indices:
        try:
            check(tf.constant(source[int(index)][0]))
        except tf.errors.InvalidArgumentError as error:
            return int(index), error.message.splitlines()[0]
    return None


def _shard_rows(global_batch_size: int, shard: int, num_shards: int) -> range:
    if global_batch_size <= 0 or num_shards <= 0 or global_batch_size % num_shards:
        raise ValueError(f'global_batch_size ({global_batch_size}) must be a positive multiple of the number of shards '
                         f'({num_shards})')
    if not 0 <= shard < num_shards:
        raise ValueError(f'shard ({shard}) must be in 0..{num_shards - 1}')
    size = global_batch_size // num_shards
    return range(shard * size, (shard + 1) * size)


def _make_dataset(source: Source, examples: Callable, preprocess: Callable, num_batches: int | None,
                  global_batch_size: int, rows: range) -> tf.data.Dataset:
    """`examples(positions)` -> indices (-1: padding) and int64 [n, 2] seeds; positions count from the first batch."""
    chunk = next(size for size in range(min(_MIN_CHUNK, len(rows)), len(rows) + 1) if len(rows) % size == 0)
    chunks_per_batch = len(rows) // chunk
    padding = encode_png(np.zeros([1, 1], np.uint8))

    def read(number):
        batch, part = divmod(int(number), chunks_per_batch)
        first = batch * global_batch_size + rows.start + part * chunk
        indices, seeds = examples(np.arange(first, first + chunk))
        is_real = indices >= 0
        encoded, labels = np.full(chunk, padding, object), np.zeros(chunk, np.int32)
        encoded[is_real], labels[is_real] = source.read(indices[is_real])
        return encoded, seeds, labels, indices

    def read_op(number):
        tensors = tf.numpy_function(read, [number], [tf.string, tf.int64, tf.int32, tf.int64])
        shapes = [chunk], [chunk, 2], [chunk], [chunk]
        return [tf.ensure_shape(tensor, shape) for tensor, shape in zip(tensors, shapes)]

    def to_row(encoded, seed, label, index):
        return {'image': preprocess(encoded, seed), 'label': label, 'index': index,
                'mask': tf.cast(index >= 0, tf.float32)}

    def to_rows(*examples):
        # An image that cannot be decoded makes its chunk too short: the batch of it is dropped and the next one taken,
        # which decodes each example by itself, with a blank behind it. Good chunks never get there.
        each = tf.data.Dataset.from_tensor_slices(examples)
        fast = each.map(to_row, synchronous=True).batch(chunk, drop_remainder=True).ignore_errors()
        careful = each.flat_map(to_row_or_blank).batch(chunk, drop_remainder=True)
        return fast.concatenate(careful).take(1)

    def to_row_or_blank(encoded, seed, label, index):
        row = tf.data.Dataset.from_tensors((encoded, seed, label, index)).map(to_row).ignore_errors()
        black = tf.zeros(row.element_spec['image'].shape, tf.uint8)
        blank = {'image': black, 'label': label, 'index': index, 'mask': 0.0}
        return row.concatenate(tf.data.Dataset.from_tensors(blank)).take(1)

    num_threads = len(os.sched_getaffinity(0))
    dataset = tf.data.Dataset.range(tf.int64.max if num_batches is None else num_batches * chunks_per_batch)
    dataset = dataset.map(read_op, num_parallel_calls=_READS_IN_FLIGHT, deterministic=True)
    dataset = dataset.interleave(to_rows, cycle_length=2 * num_threads, num_parallel_calls=num_threads,
                                 deterministic=True)
    dataset = dataset.batch(chunks_per_batch, drop_remainder=True)
    dataset = dataset.map(lambda batch: {key: tf.reshape(x, [len(rows), *x.shape[2:]]) for key, x in batch.items()})
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.prefetch(2).with_options(options)
