"""Images and data sets that the tests of the input pipeline share."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from input_pipeline.sources import record_index


@pytest.fixture(scope='session')
def photo() -> Callable[..., np.ndarray]:
    """photo(seed, height, width) -> uint8 [H, W, 3] with the 1/f spectrum of photographs, hard edges and some noise."""
    def make(seed, height=96, width=128):
        rng = np.random.default_rng(seed)
        frequency = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width)[None] ** 2
        frequency[0, 0] = 1e-4

        def layer():
            noise = np.fft.rfft2(rng.standard_normal((height, width))) / np.sqrt(frequency)
            noise = np.fft.irfft2(noise, s=(height, width))
            return noise / noise.std()

        base = layer()
        image = np.stack([120 + 40 * base + 20 * layer() for _ in range(3)], -1)
        image += rng.standard_normal((height, width, 3)) * 5
        for _ in range(8):
            top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
            bottom, right = top + rng.integers(4, height // 2), left + rng.integers(4, width // 2)
            image[top:bottom, left:right] += rng.normal(0, 40, 3)
        return np.clip(image, 0, 255).astype(np.uint8)

    return make


@pytest.fixture(scope='session')
def encode() -> Callable[..., bytes]:
    """encode(array or PIL image, format='JPEG', **options) -> bytes, by PIL."""
    def make(image, kind='JPEG', **options):
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        buffer = io.BytesIO()
        image.save(buffer, kind, **({'quality': 90} if kind == 'JPEG' else {}), **options)
        return buffer.getvalue()

    return make


@pytest.fixture(scope='session')
def write_tfrecords() -> Callable[..., None]:
    """write_tfrecords(directory, split, examples, num_shards): bare shards of (bytes, stored label), by TensorFlow."""
    def write(directory, split, examples, num_shards=3):
        bounds = np.linspace(0, len(examples), num_shards + 1).astype(int)
        for shard, (start, end) in enumerate(zip(bounds[:-1], bounds[1:])):
            with tf.io.TFRecordWriter(f'{directory}/{split}-{shard:05d}-of-{num_shards:05d}') as writer:
                for encoded, label in examples[start:end]:
                    writer.write(make_example(encoded, label).SerializeToString())

    return write


@pytest.fixture(scope='session')
def write_arrayrecords() -> Callable[..., None]:
    """write_arrayrecords(directory, split, examples, num_shards): the same as ArrayRecord, by its own writer."""
    from array_record.python.array_record_module import ArrayRecordWriter

    def write(directory, split, examples, num_shards=2, options='group_size:1'):
        for shard in range(num_shards):
            path = f'{directory}/{split}-{shard:05d}-of-{num_shards:05d}.array_record'
            writer = ArrayRecordWriter(path, options)
            for encoded, label in examples[shard * len(examples) // num_shards:
                                           (shard + 1) * len(examples) // num_shards]:
                writer.write(make_example(encoded, label).SerializeToString())
            writer.close()

    return write


@pytest.fixture(scope='module')
def examples(photo, encode):
    """23 JPEGs of five classes, counted from 0."""
    return [(encode(photo(i, 24, 32)), i % 5) for i in range(23)]


@pytest.fixture
def num_indexed(monkeypatch):
    """The shards indexed so far."""
    indexed = []
    index_shard = record_index.index_shard
    monkeypatch.setattr(record_index, 'index_shard',
                        lambda path, *keys: indexed.append(path) or index_shard(path, *keys))
    return indexed


def make_example(encoded: bytes, label: int | None) -> tf.train.Example:
    """As the well-known ImageNet shards have it: other features stand around the two that are wanted."""
    def of_bytes(*values):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    features = {'image/encoded': of_bytes(encoded), 'image/filename': of_bytes(b'x.JPEG'),
                'image/format': of_bytes(b'JPEG'),
                'image/object/bbox/xmin': tf.train.Feature(float_list=tf.train.FloatList(value=[0.25, 0.5])),
                'image/object/bbox/label': tf.train.Feature(int64_list=tf.train.Int64List(value=[300, 2])),
                'image/class/synset': of_bytes()}
    if label is not None:
        features['image/class/label'] = tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))
    return tf.train.Example(features=tf.train.Features(feature=features))
