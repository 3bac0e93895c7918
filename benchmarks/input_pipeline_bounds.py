"""Contestants of input_pipeline.py that do less than feed a network: what it can be expected to come near to.

Both take the windows of this project's first four epochs, again and again, of images in memory.
"""
import io
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from input_pipeline_others import BATCH, NUM_CORES, RATIO, SCALE
from PIL import Image


def images_and_windows(shard_dir: Path) -> tuple[list[bytes], list[tuple[int, int, int, int]]]:
    """The images, and the windows (top, left, height, width) of the first epochs, one image after the other."""
    import input_pipeline
    from input_pipeline.preprocess import crop_window

    source = input_pipeline.open_source('tfrecord', str(shard_dir), 'train')
    encoded = list(source.read(np.arange(len(source)))[0])
    windows = []
    for epoch in range(4):
        for i, image in enumerate(encoded):
            width, height = Image.open(io.BytesIO(image)).size
            key = np.array([input_pipeline.order.epoch_key(0, epoch), i]).view(np.uint64)
            draws = np.random.Generator(np.random.Philox(key=key)).random(22)
            windows.append(crop_window(draws, height, width, SCALE, RATIO))
    return encoded, windows


def crop_and_decode(shard_dir: Path, image_size: int) -> Iterator:
    """TensorFlow's crop and decode in a map; yields the top left pixels."""
    import tensorflow as tf

    encoded, windows = images_and_windows(shard_dir)
    # Only one pixel leaves the map: handing each image to Python would cost more than some of them take to decode.
    images = tf.data.Dataset.from_tensor_slices(encoded).repeat()
    dataset = tf.data.Dataset.zip(images, tf.data.Dataset.from_tensor_slices(windows).repeat()).map(
        lambda image, window: tf.image.decode_and_crop_jpeg(image, window, 3, dct_method='INTEGER_ACCURATE')[0, 0],
        num_parallel_calls=NUM_CORES, deterministic=False)
    yield from dataset.batch(BATCH).prefetch(2)


def decode_and_resize(shard_dir: Path, image_size: int) -> Iterator[np.ndarray]:
    """The calls of `preprocess.make_random_resized_crop` on images of less than twice the size, their arguments ready.

    A thread a core; yields one batch's memory over and over.
    """
    import cv2
    import simplejpeg

    from input_pipeline.preprocess import _read_simple_jpeg_header, _resize

    encoded, windows = images_and_windows(shard_dir)
    calls = []
    for image, (top, left, height, width) in zip(itertools.cycle(encoded), windows):
        _, columns, height_at = _read_simple_jpeg_header(image)
        bottom, view = top + height, memoryview(image)
        calls.append(((view[:height_at], bottom.to_bytes(2), view[height_at + 2:]), bottom, columns,
                      np.s_[top:bottom, left:left + width]))
    cv2.setNumThreads(1)
    batch = np.empty([BATCH, image_size, image_size, 3], np.uint8)

    def fill(number):
        cv2.ipp.setUseIPP_NotExact(True)
        for row in range(BATCH):
            parts, bottom, columns, window = calls[(number * BATCH + row) % len(calls)]
            pixels = simplejpeg.decode_jpeg(b''.join(parts), fastupsample=True, min_height=bottom, min_width=columns,
                                            strict=False)
            _resize(pixels[window], batch[row])
        return batch

    with ThreadPoolExecutor(NUM_CORES) as threads:
        waiting = deque(threads.submit(fill, number) for number in range(2 * NUM_CORES))
        for number in itertools.count(2 * NUM_CORES):
            waiting.append(threads.submit(fill, number))
            yield waiting.popleft().result()
