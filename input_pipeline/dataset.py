"""Source and position -> batches, read ahead and decoded in parallel."""
import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping

import cv2
import numpy as np
import tensorflow as tf

from input_pipeline import order, threads
from input_pipeline.preprocess import Crop, decode, make_center_crop, make_random_resized_crop
from input_pipeline.sources.idx import encode_png
from input_pipeline.sources.source import Source

_PART = 16  # examples that one thread reads and decodes in one go
_DEFAULT_CROP = make_random_resized_crop()


def train_dataset(source: Source, *, global_batch_size: int, image_size: int = 224, seed: int = 0,
                  start_position: int = 0, shard: int = 0, num_shards: int = 1, shuffle_block: int = 1,
                  crop: Crop = _DEFAULT_CROP, flip: bool = True, augment: Callable | None = None,
                  on_bad: Callable[[int, int], None] = lambda position, index: None,
                  on_times: Callable[[Mapping[str, float]], None] = lambda secs: None) -> tf.data.Dataset:
    """Endless batches: rows [shard * B / num_shards, (shard + 1) * B / num_shards) of each global batch of B.

    The example at position p is number `order.permutation(seed, p // N, N, shuffle_block)[p % N]` of the source's N;
    the first is at `start_position`. A block is one read of a remote source, if shuffle_block divides B / num_shards.
    Batches straddle epochs; nothing is dropped. What is random in an example depends on (seed, epoch, number) alone:
    the crop, see `preprocess`, with `flip` whether it is mirrored, and what `augment`(image, rng) then makes of it.
    on_bad is called with (position, number) of each example that cannot be used, in some thread, before its batch;
    on_times with the seconds that a thread has spent on 'read', 'decode', 'augment' and 'batch'.

    Returns batches of {'image': uint8 [B', image_size, image_size, 3], 'label': int32 [B'], 'index': int64 [B'] in the
    source, 'mask': float32 [B'] 0 where the example is bad (and the image black), else 1}, B' = B / num_shards.

    Raises ValueError if the shards do not divide the batch, or an argument is out of range.
    """
    if min(seed, start_position, shuffle_block - 1) < 0 or not isinstance(shuffle_block, int) or flip not in (0, 1):
        raise ValueError(f'seed ({seed}) and start_position ({start_position}) must be at least 0, shuffle_block '
                         f'({shuffle_block}) an integer from 1, flip ({flip}) True or False')
    batches = _positions(start_position, tf.int64.max, global_batch_size, shard, num_shards)

    def examples(positions):
        epochs, places = np.divmod(positions, len(source))
        indices, keys = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            indices[chosen] = order.permutation(seed, epoch, len(source), shuffle_block)[places[chosen]]
            keys[chosen] = order.epoch_key(seed, epoch)
        return indices, np.stack([keys, indices], axis=1).view(np.uint64)

    def change(image, rng):
        if flip and rng.random() < 0.5:
            cv2.flip(image, 1, image)
        return augment(image, rng) if augment else image

    trial, rng = np.zeros([image_size, image_size, 3], np.uint8), np.random.default_rng(0)
    try:  # now, not in some thread
        crop(encode_png(trial), rng, trial)
        change(trial, rng)
    except (TypeError, ValueError, IndexError, cv2.error) as error:
        raise ValueError(f'train_dataset.crop or augment fails (as @NAME without ()): {str(error).strip()}') from error
    part_rows = -(-_PART // shuffle_block) * shuffle_block
    return _make_dataset(source, batches, examples, crop, change, image_size, part_rows, on_bad, on_times)


def eval_dataset(source: Source, *, global_batch_size: int, image_size: int = 224, resize: int = 256,
                 interpolation: str = 'bicubic', dct_scaling: bool = False, shard: int = 0, num_shards: int = 1,
                 on_bad: Callable[[int, int], None] = lambda position, index: None) -> tf.data.Dataset:
    """ceil(N / global_batch_size) batches as those of `train_dataset`, with each example once, in order.

    The last one is padded with black images of label 0, index -1 and mask 0. `resize`: pixels of the shorter side
    before the central crop of `image_size`; `interpolation`: 'bicubic' or 'bilinear', antialiased as PIL does.
    `dct_scaling` decodes large images at a fraction of their size: faster, but not for figures to be published. Raises
    ValueError if the shards do not divide the batch, `resize` is below `image_size`, or the interpolation is unknown.
    """
    if not (isinstance(image_size, int) and isinstance(resize, int) and resize >= image_size > 0):
        raise ValueError(f'eval_dataset: resize ({resize}) must be at least image_size ({image_size}), integers both')
    if interpolation not in ('bicubic', 'bilinear'):
        raise ValueError(f"eval_dataset: interpolation must be 'bicubic' or 'bilinear', not {interpolation!r}")
    crop = make_center_crop(resize, interpolation, dct_scaling)
    batches = _positions(0, len(source), global_batch_size, shard, num_shards)

    def examples(positions):
        return np.where(positions < len(source), positions, -1), np.zeros([len(positions), 2], np.uint64)

    return _make_dataset(source, batches, examples, crop, lambda image, rng: image, image_size, _PART, on_bad)


def why_bad(source: Source, index: int) -> str:
    """Why this example is masked."""
    if problem := source.problem(index):
        return problem
    try:
        decode(source[index][0])
    except ValueError as error:
        return str(error)
    return 'it can be decoded, but train_dataset.crop fails on it'


def _positions(start: int, stop: int, global_batch_size: int, shard: int, num_shards: int) -> tf.data.Dataset:
    """int64 [rows] of each global batch that begins in start..stop-1: the positions of the shard's rows."""
    if global_batch_size <= 0 or not 0 <= shard < num_shards or global_batch_size % num_shards:
        raise ValueError(f'global_batch_size ({global_batch_size}) must be a positive multiple of the number of shards '
                         f'({num_shards}), and shard ({shard}) in 0..{num_shards - 1}')
    rows = np.split(np.arange(global_batch_size), num_shards)[shard]
    return tf.data.Dataset.range(start, stop, global_batch_size).map(lambda first: first + rows)


def _make_dataset(source: Source, batches: tf.data.Dataset, examples: Callable, crop: Crop, change: Callable,
                  image_size: int, part_rows: int, on_bad: Callable[[int, int], None],
                  on_times: Callable[[Mapping[str, float]], None] = lambda secs: None) -> tf.data.Dataset:
    """`examples(positions)` -> indices (-1: padding) and uint64 [n, 2] keys; `change(image, rng)` -> image."""
    (rows,) = batches.element_spec.shape

    def read(positions):
        indices, keys = examples(positions)
        # TensorFlow takes memory at a multiple of 64 bytes as it is, and copies other.
        memory = np.empty(rows * image_size**2 * 3 + 63, np.uint8)
        images = np.ndarray([rows, image_size, image_size, 3], np.uint8, memory, -memory.ctypes.data % 64)
        labels, mask = np.zeros(rows, np.int32), (indices >= 0).astype(np.float32)

        def read_part(start):
            laps = [('', time.perf_counter())]
            # A thread has to ask for Intel's resize: twice as fast, and rounded; OpenCV's own is 0.12 levels too dark.
            cv2.ipp.setUseIPP_NotExact(True)
            chosen = start + np.flatnonzero(indices[start:start + part_rows] >= 0)
            encoded, labels[chosen] = source.read(indices[chosen])
            philox = np.random.Philox(0)
            rng, state = np.random.Generator(philox), philox.state
            for row, data in zip(chosen, encoded):
                laps.append(('read', time.perf_counter()))
                state['state']['key'] = keys[row]
                philox.state = state  # ten times as fast as another generator
                image = images[row]
                try:
                    crop(data, rng, image)
                except ValueError:
                    mask[row] = 0.0
                    on_bad(int(positions[row]), int(indices[row]))
                    continue
                laps.append(('decode', time.perf_counter()))
                changed = change(image, rng)
                laps.append(('augment', time.perf_counter()))
                image[:] = changed  # NumPy copies nothing if it is there already
                laps.append(('batch', time.perf_counter()))
            secs = Counter()
            for (_, before), (stage, now) in itertools.pairwise(laps):
                secs[stage] += now - before
            on_times(secs)

        threads.for_each(read_part, range(0, rows, part_rows))
        images[mask == 0] = 0
        return images, labels, indices, mask

    def read_op(positions):
        tensors = tf.numpy_function(read, [positions], [tf.uint8, tf.int32, tf.int64, tf.float32], stateful=False)
        shapes = [rows, image_size, image_size, 3], [rows], [rows], [rows]
        return {key: tf.ensure_shape(tensor, shape)
                for key, tensor, shape in zip(('image', 'label', 'index', 'mask'), tensors, shapes)}

    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    options.autotune.enabled = False  # nothing here is tuned, and its thread can hold up an iterator's end for a minute
    at_once = max(2, -(-threads.NUM * part_rows // rows))  # batches that it takes to keep all threads busy
    return batches.map(read_op, num_parallel_calls=at_once, deterministic=True).prefetch(2).with_options(options)
