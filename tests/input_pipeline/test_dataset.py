"""Batches: which example stands where, for any number of shards, after any resume, whatever is broken."""

import concurrent.futures
import dataclasses
import itertools
import os
import subprocess
import sys
import threading

import cv2
import numpy as np
import pytest
import tensorflow as tf

import input_pipeline
from input_pipeline import order, preprocess, threads


@pytest.fixture(scope='module')
def source(photo):
    """37 images of one size: no batch size in these tests divides it."""
    images = np.stack([photo(seed, 40, 52) for seed in range(37)])
    return input_pipeline.array_source(images, np.arange(37) % 5)


def train(source, num_batches, **options):
    options = {'global_batch_size': 8, 'image_size': 24, 'seed': 3} | options
    batches = itertools.islice(input_pipeline.train_dataset(source, **options), num_batches)
    return [{key: x.numpy() for key, x in batch.items()} for batch in batches]


def evaluate(source, **options):
    options = {'global_batch_size': 8, 'image_size': 24, 'resize': 28} | options
    return [{key: x.numpy() for key, x in batch.items()} for batch in input_pipeline.eval_dataset(source, **options)]


def joined(batches):
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_equal(a, b):
    assert len(a) == len(b)
    for first, second in zip(a, b):
        for key in ('image', 'label', 'index', 'mask'):
            np.testing.assert_array_equal(first[key], second[key])


def test_batches_have_the_promised_shapes(source):
    for dataset in (input_pipeline.train_dataset(source, global_batch_size=8, image_size=24, num_shards=2),
                    input_pipeline.eval_dataset(source, global_batch_size=8, image_size=24, resize=28, num_shards=2)):
        assert dataset.element_spec == {
            'image': tf.TensorSpec([4, 24, 24, 3], tf.uint8), 'label': tf.TensorSpec([4], tf.int32),
            'index': tf.TensorSpec([4], tf.int64), 'mask': tf.TensorSpec([4], tf.float32)}


def test_order_is_the_permutation_and_batches_straddle_epochs(source):
    rows = joined(train(source, 14))
    wanted = np.concatenate([order.permutation(3, epoch, 37) for epoch in range(4)])[:14 * 8]
    np.testing.assert_array_equal(rows['index'], wanted)
    np.testing.assert_array_equal(rows['label'], wanted % 5)
    assert rows['mask'].all()
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(rows['index'][epoch * 37:(epoch + 1) * 37]), np.arange(37))


def test_order_in_blocks(source):
    rows = joined(train(source, 14, shuffle_block=4))
    wanted = np.concatenate([order.permutation(3, epoch, 37, 4) for epoch in range(4)])[:14 * 8]
    np.testing.assert_array_equal(rows['index'], wanted)
    assert_equal(train(source, 14, shuffle_block=4)[5:], train(source, 9, shuffle_block=4, start_position=40))
    shards = [train(source, 5, shuffle_block=4, shard=shard, num_shards=2) for shard in range(2)]
    assert_equal([joined(pair) for pair in zip(*shards)], train(source, 5, shuffle_block=4))
    with pytest.raises(ValueError, match=r'shuffle_block \(0\) an integer from 1'):
        train(source, 1, shuffle_block=0)


@pytest.mark.parametrize('block', [8, 16, 32])
def test_a_block_is_read_at_once(source, block):
    calls = []
    counted = dataclasses.replace(source, read=lambda indices: calls.append(np.sort(indices)) or source.read(indices))
    dataset = input_pipeline.train_dataset(counted, global_batch_size=32, image_size=24, shuffle_block=block)
    rows = next(iter(dataset))['index'].numpy()
    for part in np.split(rows, 32 // max(block, 16)):
        indices = np.sort(part)
        assert any(np.array_equal(call, indices) for call in calls[:])  # among those of batches that are read ahead
        # Whole blocks, on a circle: after example 36 comes example 0.
        assert (np.diff(indices, append=indices[0] + 37) > 1).sum() <= max(1, 16 // block)


def test_an_example_looks_different_in_each_epoch(source):
    rows = joined(train(source, 10))
    first, second = (rows['image'][epoch * 37:][:37][np.argsort(rows['index'][epoch * 37:][:37])] for epoch in (0, 1))
    assert all((a != b).any() for a, b in zip(first, second))


def test_seeds_differ_in_order_and_in_pixels(source):
    a, b = joined(train(source, 4, seed=0)), joined(train(source, 4, seed=1))
    assert (a['index'] != b['index']).any()
    common = np.intersect1d(a['index'], b['index'])
    assert any((a['image'][a['index'] == i] != b['image'][b['index'] == i]).any() for i in common)


@pytest.mark.parametrize('num_shards', [2, 4])
def test_shards_together_are_the_global_batch(source, num_shards):
    shards = [train(source, 6, shard=shard, num_shards=num_shards) for shard in range(num_shards)]
    assert_equal([joined(parts) for parts in zip(*shards)], train(source, 6))


@pytest.mark.parametrize('num_batches', [1, 3, 5, 9])
def test_resume_is_the_tail_of_the_uninterrupted_stream(source, num_batches):
    assert_equal(train(source, 4, start_position=8 * num_batches), train(source, num_batches + 4)[num_batches:])


def test_resume_with_another_batch_size_and_at_any_position(source):
    whole = joined(train(source, 12))
    for start, size in [(13, 8), (37, 5), (40, 33)]:
        tail = joined(train(source, 1, start_position=start, global_batch_size=size))
        for key in whole:
            np.testing.assert_array_equal(tail[key], whole[key][start:start + size])


def test_resume_deep_into_training_needs_nothing_before(source):
    position = 10**12 + 5
    epoch, place = divmod(position, 37)
    rows = joined(train(source, 1, start_position=position, global_batch_size=4))
    wanted = np.concatenate([order.permutation(3, epoch, 37), order.permutation(3, epoch + 1, 37)])[place:place + 4]
    np.testing.assert_array_equal(rows['index'], wanted)


def test_batches_do_not_depend_on_the_number_of_threads(source, monkeypatch):
    wanted = train(source, 10, global_batch_size=70)
    for num_threads in (1, 7):
        monkeypatch.setattr(threads, '_POOL', concurrent.futures.ThreadPoolExecutor(num_threads))
        assert_equal(train(source, 10, global_batch_size=70), wanted)


def test_two_iterators_of_one_dataset_do_not_disturb_each_other(source):
    dataset = input_pipeline.train_dataset(source, global_batch_size=8, image_size=24, seed=3)
    first, second = iter(dataset), iter(dataset)
    pairs = [(next(first)['index'].numpy(), next(second)['index'].numpy()) for _ in range(6)]
    for (a, b), wanted in zip(pairs, train(source, 6)):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, wanted['index'])


def test_parts_fit_every_batch_size(source):
    wanted = np.concatenate([order.permutation(3, epoch, 37) for epoch in range(12)])
    for size in (1, 31, 37, 67, 96, 130):
        np.testing.assert_array_equal(joined(train(source, 2, global_batch_size=size))['index'], wanted[:2 * size])


def whole(encoded, rng, out):
    """The image's first pixels, none drawn at random."""
    out[:] = preprocess.decode(encoded)[:len(out), :len(out)]


def test_crop_and_flip_are_replaceable(source):
    for flip in (False, True):
        rows = joined(train(source, 15, crop=whole, flip=flip))
        pairs = [(image, preprocess.decode(source[index][0])[:24, :24])
                 for image, index in zip(rows['image'], rows['index'])]
        is_same = [(image == wanted).all() for image, wanted in pairs]
        assert all(same or (image == wanted[:, ::-1]).all() for same, (image, wanted) in zip(is_same, pairs))
        assert (40 < sum(is_same) < 80) if flip else all(is_same)


@pytest.mark.skipif(not cv2.ipp.useIPP(), reason='this OpenCV has no kernels of Intel')
def test_resizing_rounds_to_the_nearest(source):
    """Of what OpenCV makes of the same images in float32; its own kernel for bytes is off by up to 0.75."""
    rows = joined(train(source, 15, crop=input_pipeline.make_random_shift(0), flip=False))
    wanted = [cv2.resize(np.float32(preprocess.decode(source[index][0])), (24, 24)) for index in rows['index']]
    assert np.abs(rows['image'] - np.stack(wanted)).max() <= 0.51


def test_flip_does_not_follow_the_crop(source):
    def first_draw(encoded, rng, out):
        out[:] = 0
        out[0] = int(256 * rng.random(22)[0])
        out[1, 0] = 1  # on the right if mirrored

    images = joined(train(source, 50, crop=first_draw))['image']
    assert abs(np.corrcoef(images[:, 0, 0, 0], images[:, 1, 0, 0])[0, 1]) < 0.25
    assert len(np.unique(images[:, 0, 0, 0])) > 150


def test_augment_gets_the_crop_and_draws_of_its_own(source):
    def augment(image, rng):
        image[0, 0] = int(256 * rng.random())
        return image

    plain, rows = joined(train(source, 10)), joined(train(source, 10, augment=augment))
    np.testing.assert_array_equal(rows['image'][:, 1:], plain['image'][:, 1:])
    assert len(np.unique(rows['image'][:, 0, 0, 0])) > 50


@pytest.mark.parametrize('size', [1, 7, 8, 37, 64])
def test_evaluation_counts_each_example_once(source, size):
    batches = evaluate(source, global_batch_size=size)
    assert len(batches) == -(-37 // size)
    rows = joined(batches)
    assert len(rows['index']) == len(batches) * size
    np.testing.assert_array_equal(rows['index'][:37], np.arange(37))
    np.testing.assert_array_equal(rows['label'][:37], np.arange(37) % 5)
    np.testing.assert_array_equal(rows['mask'], np.arange(len(batches) * size) < 37)
    assert (rows['index'][37:] == -1).all()
    assert not rows['label'][37:].any()
    assert not rows['image'][37:].any()


@pytest.mark.parametrize('num_shards', [2, 4])
def test_shards_together_are_the_global_evaluation_batch(source, num_shards):
    shards = [evaluate(source, shard=shard, num_shards=num_shards) for shard in range(num_shards)]
    assert_equal([joined(parts) for parts in zip(*shards)], evaluate(source))


@pytest.fixture
def folders(tmp_path, photo, encode):
    """Two folders of 40 JPEGs that differ in three files: damaged in one, whole in the other."""
    for name in ('good', 'bad'):
        for i in range(40):
            path = tmp_path / name / 'train' / f'class{i // 20}' / f'{i:02d}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(photo(i, 40, 52)))
    bad = tmp_path / 'bad' / 'train'
    whole = (bad / 'class0' / '03.jpg').read_bytes()
    (bad / 'class0' / '03.jpg').write_bytes(whole[:len(whole) // 2])
    (bad / 'class0' / '04.jpg').write_bytes(b'<html>404 not found</html>')
    (bad / 'class1' / '39.jpg').write_bytes(b'')
    return [input_pipeline.open_source('folder', tmp_path / name, 'train') for name in ('good', 'bad')]


@pytest.mark.parametrize('run', [lambda source: train(source, 10), evaluate, lambda source: train(
    source, 2, global_batch_size=80)], ids=['train', 'eval', 'chunks'])
def test_an_undecodable_example_is_black_in_its_place_and_the_others_stay(folders, run):
    good, bad = (joined(run(source)) for source in folders)
    np.testing.assert_array_equal(bad['index'], good['index'])
    np.testing.assert_array_equal(bad['label'], good['label'])
    is_bad = np.isin(bad['index'], [3, 4, 39])
    assert is_bad.sum() >= 3
    np.testing.assert_array_equal(bad['mask'], ~is_bad)
    assert not bad['image'][is_bad].any()
    np.testing.assert_array_equal(bad['image'][~is_bad], good['image'][~is_bad])


def test_an_augmentation_that_fails_on_some_images_does_not_pass_for_bad_examples(source):
    def augment(image, rng):
        if image.any():  # not on the black one it is tried on
            raise ValueError('wrong shape')
        return image

    with pytest.raises(tf.errors.OpError, match='wrong shape'):
        train(source, 1, augment=augment)


def test_a_file_that_vanished_is_named(folders):
    source = folders[0]
    os.remove(source.where(7))
    with pytest.raises(tf.errors.OpError, match='07.jpg'):
        train(source, 5)


@pytest.mark.parametrize(('options', 'words'), [
    ({'global_batch_size': 6, 'num_shards': 4}, 'global_batch_size (6)'),
    ({'global_batch_size': 0}, 'global_batch_size (0)'),
    ({'shard': 2, 'num_shards': 2}, 'shard (2)'), ({'seed': -1}, 'seed (-1)'), ({'start_position': -8}, '(-8)'),
    *(({'augment': make}, 'without ()') for make in (input_pipeline.make_rand_augment, input_pipeline.make_auto_augment,
                                                     input_pipeline.make_color_jitter)),
    ({'crop': input_pipeline.make_random_shift}, 'without ()'),
    ({'crop': input_pipeline.make_random_shift(-1)}, 'fails'), ({'image_size': 0}, 'fails'),
    ({'shuffle_block': 1.5}, 'shuffle_block (1.5)'), ({'flip': 'no'}, 'flip (no)')])
def test_wrong_arguments_are_told(source, options, words):
    with pytest.raises(ValueError) as error:
        train(source, 1, **options)
    assert words in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('options', 'words'), [({'resize': 20}, 'resize (20)'), ({'image_size': 24.0}, '24.0'),
                                                ({'interpolation': 'nearest'}, "'nearest'")])
def test_wrong_evaluation_arguments_are_told(source, options, words):
    with pytest.raises(ValueError) as error:
        evaluate(source, **options)
    assert words in str(error.value)


def test_import_is_cheap():
    code = 'import sys, input_pipeline; print([m for m in ("tensorflow_datasets", "array_record") if m in sys.modules])'
    root = os.path.dirname(os.path.dirname(input_pipeline.__file__))
    run = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout == '[]\n'


def test_blocks_as_large_as_a_batch_leave_no_thread_idle(source, monkeypatch):
    num_threads, seen = 6, []
    monkeypatch.setattr(threads, 'NUM', num_threads)
    monkeypatch.setattr(threads, '_POOL', concurrent.futures.ThreadPoolExecutor(num_threads))
    all_at_once = threading.Barrier(num_threads, timeout=60)

    def crop(encoded, rng, out):
        seen.append(None)
        if 1 < len(seen) <= num_threads + 1:  # the first is the trial
            all_at_once.wait()

    options = tf.data.Options()
    options.threading.private_threadpool_size = num_threads  # TensorFlow's own has one a core, few here
    dataset = input_pipeline.train_dataset(source, global_batch_size=16, image_size=24, shuffle_block=16, crop=crop)
    assert len([*itertools.islice(dataset.with_options(options), num_threads)]) == num_threads
    assert not all_at_once.broken


def test_nothing_is_tuned_by_tensorflow(source):
    """Its thread may sleep through the end of an iterator, which then takes up to a minute."""
    for dataset in (input_pipeline.train_dataset(source, global_batch_size=8, image_size=8),
                    input_pipeline.eval_dataset(source, global_batch_size=8, image_size=8, resize=8)):
        assert dataset.options().autotune.enabled is False
