"""Remote shards give what local ones do, in few reads: ram:// is a file system of TensorFlow as gs:// is, in memory."""

import concurrent.futures

import numpy as np
import pytest
import tensorflow as tf
from source_harness import assert_data_error, assert_holds

import input_pipeline


@pytest.fixture
def remote(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    directory = f'ram://{tmp_path.name}'
    tf.io.gfile.makedirs(directory)
    yield directory
    tf.io.gfile.rmtree(directory)


@pytest.fixture
def reads(monkeypatch):
    """(path, bytes) of each read through TensorFlow's files so far."""
    done = []

    class Recorded(tf.io.gfile.GFile):
        def read(self, n=-1):
            data = super().read(n)
            done.append((self.name, len(data)))
            return data

    monkeypatch.setattr(tf.io.gfile, 'GFile', Recorded)
    return done


def test_remote_tfrecord(tmp_path, remote, examples, write_tfrecords, num_indexed):
    write_tfrecords(remote, 'train', [(encoded, label + 1) for encoded, label in examples])
    write_tfrecords(remote, 'validation', [(encoded, label + 1) for encoded, label in examples[1:5]], 1)
    for _ in range(2):
        source = input_pipeline.open_source('tfrecord', remote, 'train')
        assert_holds(source, examples)
        assert_holds(input_pipeline.open_source('tfrecord', remote, 'validation'), examples[1:5])
    assert source.where(8).startswith(f'{remote}/train-00001-of-00003')
    assert len(num_indexed) == 4
    assert len(list((tmp_path / 'cache' / 'ghostnet').glob('*.ghostnet-index.npz'))) == 2
    assert len(tf.io.gfile.listdir(remote)) == 4
    for name in tf.io.gfile.glob(f'{remote}/train-*'):
        tf.io.gfile.remove(name)  # ram:// would append
    write_tfrecords(remote, 'train', examples[5:])
    assert_holds(input_pipeline.open_source('tfrecord', remote, 'train'), examples[5:])
    assert len(num_indexed) == 7


def test_what_is_wrong_with_remote_shards(remote, examples, write_tfrecords):
    write_tfrecords(remote, 'train', examples, 1)
    path = f'{remote}/train-00000-of-00001'
    with tf.io.gfile.GFile(path, 'rb') as file:
        whole = file.read()
    for content, words in [(whole[:-1], 'cut off'), (whole[:8] + b'abcd' + whole[12:], 'record 0 at byte 0')]:
        tf.io.gfile.remove(path)  # ram:// would append
        with tf.io.gfile.GFile(path, 'wb') as file:
            file.write(content)
        assert_data_error([path, words], 'tfrecord', remote)
    assert_data_error(['validation-?????-of-?????', 'train', remote], 'tfrecord', remote, 'validation')
    assert_data_error([f'{remote}/nowhere', 'cannot be read'], 'tfrecord', f'{remote}/nowhere')


@pytest.fixture
def large(remote, write_tfrecords):
    """200 examples as large as photographs, in four remote shards."""
    rng = np.random.default_rng(0)
    examples = [(b'\xff\xd8\xff' + rng.bytes(int(rng.integers(70_000, 90_000))), i % 10) for i in range(200)]
    write_tfrecords(remote, 'train', examples, 4)
    return input_pipeline.open_source('tfrecord', remote, 'train'), examples


def test_neighbours_are_one_read(large, reads):
    source, examples = large
    for indices, num_reads in [(np.arange(16), 1), (np.arange(30, 14, -1), 1), (np.arange(44, 56), 2), ([7, 7, 7], 1),
                               ([3, 60, 4, 61, 5], 2), (np.arange(0, 48, 3), 16), ([], 0)]:
        reads.clear()
        indices = np.array(indices, np.int64)
        encoded, labels = source.read(indices)
        assert [(image, int(label)) for image, label in zip(encoded, labels)] == [examples[i] for i in indices]
        assert len(reads) == num_reads
        wanted = sum(len(examples[i][0]) for i in set(indices.tolist()))
        assert wanted <= sum(length for _, length in reads) <= wanted + 1000 * len(indices)


@pytest.mark.parametrize(('block_size', 'most'), [(16, 1.5), (8, 2.5), (1, 16)])
def test_reads_of_a_shuffle_in_blocks(large, reads, block_size, most):
    source, _ = large
    n, num_parts = len(source), 50  # 800 positions, four epochs
    for part in range(num_parts):
        positions = range(part * 16, part * 16 + 16)
        source.read(np.array([input_pipeline.order.permutation(0, p // n, n, block_size)[p % n] for p in positions]))
    assert most * 0.6 * num_parts < len(reads) <= most * num_parts


def test_many_threads_read_one_remote_shard(large):
    source, examples = large
    rng = np.random.default_rng(1)

    def read(indices):
        return [*zip(*(values if isinstance(values, list) else values.tolist() for values in source.read(indices)))]

    parts = [rng.integers(0, 200, 16) for _ in range(100)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for part, result in zip(parts, pool.map(read, parts)):
            assert result == [examples[i] for i in part]
