"""Each source gives the bytes and labels that were put there, and says in one line what is wrong when it cannot."""

import concurrent.futures
import gzip
import io
import os
import shutil
import struct
import tempfile

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import input_pipeline
from input_pipeline.sources import index_cache, record_index
from input_pipeline.sources.idx import encode_png


@pytest.fixture(scope='module')
def examples(photo, encode):
    """23 JPEGs of five classes, counted from 0."""
    return [(encode(photo(i, 24, 32)), i % 5) for i in range(23)]


def assert_data_error(words, name, data_dir, split='train'):
    with pytest.raises(input_pipeline.DataError) as error:
        input_pipeline.open_source(name, data_dir, split)
    message = str(error.value)
    assert '\n' not in message
    for word in words:
        assert str(word) in message, message


def assert_holds(source, examples, num_classes=5):
    assert len(source) == len(examples)
    assert source.num_classes == len(source.class_names) == num_classes
    assert [source[i] for i in range(len(source))] == examples
    order = np.array([3, 1, 3, len(examples) - 1])
    encoded, labels = source.read(order)
    assert list(encoded) == [examples[i][0] for i in order]
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, [examples[i][1] for i in order])
    encoded, labels = source.read(order[:0])
    assert len(encoded) == 0
    assert labels.shape == (0,)
    with pytest.raises(IndexError):
        source[len(examples)]


# TFRecord

@pytest.mark.parametrize('first', [0, 1])
def test_tfrecord_with_labels_from_zero_or_one(tmp_path, examples, write_tfrecords, first):
    write_tfrecords(tmp_path, 'train', [(encoded, label + first) for encoded, label in examples])
    source = input_pipeline.open_source('tfrecord', tmp_path, 'train')
    assert_holds(source, examples)
    assert 'train-00001-of-00003' in source.where(8)


def test_the_train_split_decides_from_where_a_small_split_counts(tmp_path, examples, write_tfrecords):
    write_tfrecords(tmp_path, 'train', examples)
    validation = [example for example in examples if example[1] in (1, 3)]
    write_tfrecords(tmp_path, 'validation', validation, 2)
    assert_holds(input_pipeline.open_source('tfrecord', tmp_path, 'validation'), validation)
    os.mkdir(tmp_path / 'alone')
    for name in os.listdir(tmp_path):
        if name.startswith('validation-'):
            shutil.copy(tmp_path / name, tmp_path / 'alone')
    alone = input_pipeline.open_source('tfrecord', tmp_path / 'alone', 'validation')
    assert_holds(alone, [(encoded, label - 1) for encoded, label in validation], num_classes=3)


@pytest.mark.parametrize(('train_labels', 'labels', 'words'), [
    ([1, 2, 3], [0, 1], ['validation', 'train has 1..3']), ([0, 1, 2], [1, 3], ['validation', 'train has 0..2']),
    ([2, 3], [2, 3], ['2..3', 'must be 0 or 1']), ([-1, 0], [0], ['-1..0', 'must be 0 or 1'])])
def test_labels_that_fit_no_rule(tmp_path, examples, write_tfrecords, train_labels, labels, words):
    write_tfrecords(tmp_path, 'train', [(examples[0][0], label) for label in train_labels], 1)
    write_tfrecords(tmp_path, 'validation', [(examples[0][0], label) for label in labels], 1)
    assert_data_error(words, 'tfrecord', tmp_path, 'validation')


def test_tfrecord_without_label_or_image(tmp_path, examples, write_tfrecords):
    write_tfrecords(tmp_path, 'train', [*examples[:20], (examples[0][0], None)], 1)
    assert_data_error(['train-00000-of-00001', 'record 20', "'image/class/label'", 'image/encoded'], 'tfrecord',
                      tmp_path)
    with tf.io.TFRecordWriter(f'{tmp_path}/test-00000-of-00001') as writer:
        writer.write(tf.train.Example().SerializeToString())
    assert_data_error(['record 0', "'image/encoded'", 'has: none'], 'tfrecord', tmp_path, 'test')
    with tf.io.TFRecordWriter(f'{tmp_path}/text-00000-of-00001') as writer:
        writer.write(b'hello, this is text')
    assert_data_error(['record 0', 'no tf.train.Example'], 'tfrecord', tmp_path, 'text')


def test_missing_and_mixed_shards(tmp_path, examples, write_tfrecords):
    assert_data_error(['train-?????-of-?????', tmp_path, 'none'], 'tfrecord', tmp_path)
    write_tfrecords(tmp_path, 'train', examples, 4)
    assert_data_error(['validation-?????-of-?????', 'train'], 'tfrecord', tmp_path, 'validation')
    os.remove(tmp_path / 'train-00002-of-00004')
    assert_data_error(['lacks 1 of the 4', 'train-00002-of-00004'], 'tfrecord', tmp_path)
    write_tfrecords(tmp_path, 'train', examples, 3)
    assert_data_error(['-of-00003', '-of-00004'], 'tfrecord', tmp_path)


def test_damaged_shards(tmp_path, examples, write_tfrecords):
    write_tfrecords(tmp_path, 'train', examples, 1)
    path = tmp_path / 'train-00000-of-00001'
    whole = path.read_bytes()
    second = 16 + struct.unpack_from('<Q', whole)[0]
    for position in (0, 8, second, second + 3, second + 9):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        assert_data_error([path, f'record {int(position >= second)}', 'checksum'], 'tfrecord', tmp_path)
    for length in (len(whole) - 1, len(whole) - 300, second + 5, second + 14):
        path.write_bytes(whole[:length])
        assert_data_error([path, 'cut off'], 'tfrecord', tmp_path)
    path.write_bytes(gzip.compress(whole))
    assert_data_error([path, 'compressed'], 'tfrecord', tmp_path)
    path.write_bytes(b'')
    assert_data_error(['train', 'no record'], 'tfrecord', tmp_path)


@pytest.mark.parametrize('first', [0, 1])
def test_damaged_records_are_no_labels_that_are_out_of_range(tmp_path, examples, write_tfrecords, first):
    write_tfrecords(tmp_path, 'train', [(encoded, label + first) for encoded, label in examples], 1)
    path, at = tmp_path / 'train-00000-of-00001', 0
    damaged = bytearray(path.read_bytes())
    for number in range(len(examples)):
        if number % 5 == 2:
            damaged[at + 30] ^= 4
        at += 16 + struct.unpack_from('<Q', damaged, at)[0]
    path.write_bytes(damaged)
    source = input_pipeline.open_source('tfrecord', tmp_path, 'train')
    for number, example in enumerate(examples):
        is_damaged = number % 5 == 2
        assert source[number] == ((b'', 0) if is_damaged else example)
        assert ('checksum' in source.problem(number)) == is_damaged


def test_checksum_is_that_of_tensorflow(tmp_path):
    lengths = [0, 1, 255, 70_000]
    with tf.io.TFRecordWriter(f'{tmp_path}/x') as writer:
        for length in lengths:
            writer.write(b'a' * length)
    data, at, stored = (tmp_path / 'x').read_bytes(), 0, []
    for length in lengths:
        stored.append(struct.unpack_from('<I', data, at + 8)[0])
        at += 16 + length
        assert record_index.masked_crc32c(b'a' * length) == struct.unpack_from('<I', data, at - 4)[0]
    assert [record_index.masked_crc32c(struct.pack('<Q', length)) for length in lengths] == stored


@pytest.mark.parametrize('label', [0, 1, 127, 128, 999, 2**40, -1])
def test_fields_are_found_where_protobuf_puts_them(label):
    features = {'a': tf.train.Feature(int64_list=tf.train.Int64List(value=[1, 2, 3])),
                'i': tf.train.Feature(bytes_list=tf.train.BytesList(value=[b'x' * 300])),
                'l': tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))}
    record = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
    offset, length, found = record_index.find_image_and_label(record, 'i', 'l')
    assert record[offset:offset + length] == b'x' * 300
    assert found == label
    for image_key, label_key, words in [('a', 'l', "'a' is not one string"), ('i', 'a', "'a' holds more than one"),
                                        ('q', 'i', "'i' is not one integer"), ('i', 'q', "no feature 'q'")]:
        with pytest.raises(ValueError, match=words):
            record_index.find_image_and_label(record, image_key, label_key)


# The cached index

@pytest.fixture
def num_indexed(monkeypatch):
    """The shards indexed so far."""
    indexed = []
    index_shard = record_index.index_shard
    monkeypatch.setattr(record_index, 'index_shard',
                        lambda path, *keys: indexed.append(path) or index_shard(path, *keys))
    return indexed


def test_the_index_is_made_once_and_again_when_a_shard_changes(tmp_path, examples, write_tfrecords, num_indexed):
    write_tfrecords(tmp_path, 'train', examples)
    for _ in range(2):
        assert_holds(input_pipeline.open_source('tfrecord', tmp_path, 'train'), examples)
    assert len(num_indexed) == 3
    assert [name for name in os.listdir(tmp_path) if not name.startswith('train-0000')] == [
        name for name in os.listdir(tmp_path) if name.endswith('.ghostnet-index.npz')]
    write_tfrecords(tmp_path, 'train', examples[::-1])
    assert_holds(input_pipeline.open_source('tfrecord', tmp_path, 'train'), examples[::-1])
    assert len(num_indexed) == 6
    stat = os.stat(tmp_path / 'train-00001-of-00003')
    os.utime(tmp_path / 'train-00001-of-00003', ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert_holds(input_pipeline.open_source('tfrecord', tmp_path, 'train'), examples[::-1])
    assert len(num_indexed) == 9


def test_a_damaged_cache_is_made_again(tmp_path, examples, write_tfrecords, num_indexed):
    write_tfrecords(tmp_path, 'train', examples)
    input_pipeline.open_source('tfrecord', tmp_path, 'train')
    (cache,) = tmp_path.glob('*.ghostnet-index.npz')
    whole = cache.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b'', whole[:100], bytes(flipped), b'not an archive'):
        num_indexed.clear()
        cache.write_bytes(content)
        assert_holds(input_pipeline.open_source('tfrecord', tmp_path, 'train'), examples)
        assert len(num_indexed) == 3


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """Makes directories read-only for everybody, also for root, to whom permission bits mean nothing."""
    refused = []
    real = tempfile.TemporaryDirectory

    def refusing(*args, dir, **options):
        if any(os.path.commonpath([dir, path]) == str(path) for path in refused):
            raise PermissionError(30, 'Read-only file system', dir)
        return real(*args, dir=dir, **options)

    monkeypatch.setattr(index_cache.tempfile, 'TemporaryDirectory', refusing)
    return refused.append


def test_beside_read_only_shards_the_index_is_cached_in_the_cache_directory(tmp_path, monkeypatch, examples, read_only,
                                                                           write_tfrecords, num_indexed):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    for name in ('a', 'b'):  # the same names in two places must not share a cache
        (tmp_path / name).mkdir()
        write_tfrecords(tmp_path / name, 'train', examples if name == 'a' else examples[::-1])
        read_only(tmp_path / name)
    for _ in range(2):
        assert_holds(input_pipeline.open_source('tfrecord', tmp_path / 'a', 'train'), examples)
        assert_holds(input_pipeline.open_source('tfrecord', tmp_path / 'b', 'train'), examples[::-1])
    assert len(num_indexed) == 6
    assert len(list((tmp_path / 'cache' / 'ghostnet').glob('*.ghostnet-index.npz'))) == 2
    assert not list((tmp_path / 'a').glob('*.npz'))


def test_without_any_place_to_cache_it_still_works(tmp_path, monkeypatch, examples, read_only, write_tfrecords,
                                                   num_indexed):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    write_tfrecords(tmp_path, 'train', examples)
    read_only(tmp_path)
    for _ in range(2):
        assert_holds(input_pipeline.open_source('tfrecord', tmp_path, 'train'), examples)
    assert len(num_indexed) == 6


# Remote: ram:// is a file system of TensorFlow as gs:// is one, in memory.

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


# ArrayRecord

@pytest.mark.parametrize('first', [0, 1])
def test_arrayrecord(tmp_path, examples, write_arrayrecords, first):
    stored = [(encoded, label + first) for encoded, label in examples]
    write_arrayrecords(tmp_path, 'train', stored)
    write_arrayrecords(tmp_path, 'validation', stored[1:5])
    for _ in range(2):
        assert_holds(input_pipeline.open_source('arrayrecord', tmp_path, 'train'), examples)
        assert_holds(input_pipeline.open_source('arrayrecord', tmp_path, 'validation'), examples[1:5])
    assert_data_error(['test-?????-of-?????.array_record', 'train, validation'], 'arrayrecord', tmp_path, 'test')


def test_damaged_arrayrecord(tmp_path, examples, write_arrayrecords):
    write_arrayrecords(tmp_path, 'train', examples, 1)
    path = tmp_path / 'train-00000-of-00001.array_record'
    path.write_bytes(path.read_bytes()[:1000])
    assert_data_error(['train of', tmp_path, 'cannot be read'], 'arrayrecord', tmp_path)


# Folder

@pytest.fixture
def folder(tmp_path, examples):
    for i, (encoded, label) in enumerate(sorted(examples, key=lambda example: example[1])):
        path = tmp_path / 'train' / f'n{label}' / f'{i:03d}{[".JPEG", ".jpg", ".jpeg", ".png"][i % 4]}'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    return tmp_path


def test_folder_is_sorted_by_class_and_name(folder, examples):
    (folder / 'train' / 'n0' / 'README.txt').write_text('no image')
    source = input_pipeline.open_source('folder', folder, 'train')
    assert_holds(source, sorted(examples, key=lambda example: example[1]))
    assert list(source.class_names) == ['n0', 'n1', 'n2', 'n3', 'n4']
    assert source.where(0) == str(folder / 'train' / 'n0' / '000.JPEG')


def test_the_train_folder_decides_which_label_a_class_has(folder):
    shutil.copytree(folder / 'train' / 'n3', folder / 'val' / 'n3')
    source = input_pipeline.open_source('folder', folder, 'val')
    assert source.num_classes == 5
    assert {source[i][1] for i in range(len(source))} == {3}
    shutil.copytree(folder / 'train' / 'n3', folder / 'val' / 'other')
    assert_data_error(["'other'", 'train'], 'folder', folder, 'val')


def test_wrong_folders(folder):
    assert_data_error([folder / 'test', 'train', '<class>/*.JPEG'], 'folder', folder, 'test')
    (folder / 'train' / 'n2b').mkdir()
    assert_data_error([folder / 'train' / 'n2b', 'no image'], 'folder', folder)
    (folder / 'flat').mkdir()
    (folder / 'flat' / 'x.jpg').write_bytes(b'')
    assert_data_error([folder / 'flat', 'no class directories'], 'folder', folder, 'flat')


def test_files_that_are_no_images_are_refused(tmp_path):
    for i in range(20):
        path = tmp_path / 'train' / 'a' / f'{i:02d}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'<html>not found</html>')
    assert_data_error([tmp_path / 'train' / 'a' / '00.jpg', 'is no JPEG'], 'folder', tmp_path)


# idx and arrays

def write_idx(path, array):
    header = struct.pack(f'>BBBB{array.ndim}I', 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, n in (('train', 30), ('t10k', 11)):
        write_idx(tmp_path / f'{prefix}-images-idx3-ubyte.gz', rng.integers(0, 256, (n, 28, 28), np.uint8))
        write_idx(tmp_path / f'{prefix}-labels-idx1-ubyte.gz', (np.arange(n) % 10).astype(np.uint8))
    return tmp_path


def test_idx_gives_the_pixels(idx):
    rng = np.random.default_rng(0)
    for split, n in (('train', 30), ('test', 11)):
        source = input_pipeline.open_source('idx', idx, split)
        assert (len(source), source.num_classes) == (n, 10)
        for i, wanted in enumerate(rng.integers(0, 256, (n, 28, 28), np.uint8)):
            encoded, label = source[i]
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), wanted)
            assert label == i % 10


def test_wrong_idx_files(idx):
    assert_data_error(['validation', 'train, test'], 'idx', idx, 'validation')
    images, labels = idx / 'train-images-idx3-ubyte.gz', idx / 'train-labels-idx1-ubyte.gz'
    write_idx(labels, np.zeros(29, np.uint8))
    assert_data_error(['30 images', '29 labels'], 'idx', idx)
    whole = gzip.decompress(images.read_bytes())
    for content, words in [(gzip.compress(whole[:-5]), 'cut off'), (images.read_bytes()[:500], 'cannot be read'),
                           (whole, 'cannot be read'), (gzip.compress(b'hello'), 'no idx file')]:
        images.write_bytes(content)
        assert_data_error([images, words], 'idx', idx)
    os.remove(images)
    remedies = 'dataset-fashion-mnist', '/usr/share/datasets/fashion-mnist', 'tfds:fashion_mnist'
    assert_data_error([images, *remedies], 'idx', idx)


@pytest.mark.parametrize('shape', [(28, 28), (1, 1), (5, 7, 3), (300, 200, 3)])
def test_png_decodes_to_the_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    encoded = encode_png(pixels)
    image = Image.open(io.BytesIO(encoded))
    image.verify()  # the checksums
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), pixels)
    np.testing.assert_array_equal(tf.image.decode_png(encoded).numpy().reshape(shape), pixels)


def test_array_source():
    images, labels = np.random.default_rng(0).integers(0, 256, (6, 9, 8, 3), np.uint8), np.array([0, 1, 2, 0, 1, 3])
    source = input_pipeline.array_source(images, labels)
    assert_holds(source, [(encode_png(image), label) for image, label in zip(images, labels)], num_classes=4)
    assert input_pipeline.array_source(images[..., 0], labels, num_classes=10).num_classes == 10
    for wrong, wrong_labels, words in [(images / 255, labels, 'float64'), (images, labels[1:], r'\[6\]'),
                                       (images, labels / 2, 'float64'), (images, labels - 1, '-1..2'),
                                       (images[:0], labels[:0], r'\[0, 9, 8, 3\]'),
                                       (images[..., :2], labels, 'N, H, W, 3')]:
        with pytest.raises(input_pipeline.DataError, match=words):
            input_pipeline.array_source(wrong, wrong_labels)
    with pytest.raises(input_pipeline.DataError, match=r'0\.\.2'):
        input_pipeline.array_source(images, labels, num_classes=3)


# Names and places

def test_unknown_sources_and_places(tmp_path):
    assert_data_error(["'tfrecords'", "did you mean 'tfrecord'"], 'tfrecords', tmp_path)
    assert_data_error(["'xyzzy'", 'folder, idx'], 'xyzzy', tmp_path)
    assert_data_error(["'tfds:'", 'tfds:NAME'], 'tfds:', tmp_path)
    for name in ('tfrecord', 'arrayrecord', 'folder', 'idx'):
        assert_data_error([tmp_path / 'nowhere', name], name, tmp_path / 'nowhere')
    for name in ('arrayrecord', 'folder', 'idx', 'shapes'):
        assert_data_error(['gs://bucket/data', 'remote', name, "'tfrecord'"], name, 'gs://bucket/data')
    assert_data_error(['xyz://a', 'remote', 'gs://'], 'tfds:mnist', 'xyz://a')
    assert_data_error(['xyz://a', "'xyz' not implemented"], 'tfrecord', 'xyz://a')
