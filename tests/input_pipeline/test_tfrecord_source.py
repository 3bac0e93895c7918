"""TFRecord gives the bytes and labels that were put there; its index is made once, kept in a cache, and checked."""

import gzip
import os
import shutil
import struct
import tempfile

import pytest
import tensorflow as tf
from source_harness import assert_data_error, assert_holds

import input_pipeline
from input_pipeline.sources import index_cache, record_index


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
    write_tfrecords(tmp_path / 'alone', 'training', examples)  # no split is named train: all of them decide
    assert_holds(input_pipeline.open_source('tfrecord', tmp_path / 'alone', 'validation'), validation)


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


def test_a_split_of_nothing(tmp_path, examples, write_tfrecords):
    write_tfrecords(tmp_path, 'train', examples)
    write_tfrecords(tmp_path, 'validation', [], 1)
    assert_data_error(['validation', 'holds no example'], 'tfrecord', tmp_path, 'validation')


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
