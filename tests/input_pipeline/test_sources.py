"""Each local source but TFRecord and TFDS gives what was put there; names and places that are none are refused."""

import gzip
import io
import os
import shutil
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from source_harness import assert_data_error, assert_holds

import input_pipeline
from input_pipeline.sources.idx import encode_png

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


def test_what_is_left_out_of_a_folder_is_said(folder, caplog):
    size = len(input_pipeline.open_source('folder', folder, 'train'))
    assert not caplog.records
    (folder / 'train' / 'n0' / '000.JPEG').rename(folder / 'train' / 'n0' / '000.GIF')
    (folder / 'train' / 'n0' / 'photo.webp').write_text('of a format that is not decoded')
    (folder / 'train' / 'n1' / 'more').mkdir()
    assert len(input_pipeline.open_source('folder', folder, 'train')) == size
    assert f'{folder / "train"}: left out 2 entries' in caplog.text and '.JPEG (or .jpg' in caplog.text


def test_the_train_folder_decides_which_label_a_class_has(folder):
    shutil.copytree(folder / 'train' / 'n3', folder / 'val' / 'n3')
    source = input_pipeline.open_source('folder', folder, 'val')
    assert source.num_classes == 5
    assert {source[i][1] for i in range(len(source))} == {3}
    shutil.copytree(folder / 'train' / 'n3', folder / 'val' / 'other')
    assert_data_error(["'other'", 'train'], 'folder', folder, 'val')


def test_without_a_train_folder_all_splits_decide(folder):
    (folder / 'train').rename(folder / 'training')
    shutil.copytree(folder / 'training' / 'n3', folder / 'val' / 'n3')
    source = input_pipeline.open_source('folder', folder, 'val')
    assert list(source.class_names) == ['n0', 'n1', 'n2', 'n3', 'n4']
    assert {source[i][1] for i in range(len(source))} == {3}


def test_a_link_to_nothing_is_refused(folder):
    link = folder / 'train' / 'n1' / 'z.jpg'
    link.symlink_to(folder / 'gone.jpg')
    assert_data_error([link, 'not there'], 'folder', folder)


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
