"""launch/reencode.py: the same examples in smaller JPEGs, whatever stops it; what is damaged is found."""

import fcntl
import importlib.util
import io
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import input_pipeline

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHORT_SIDE = 32
SIZES = [(50, 60), (96, 64), (31, 40), (32, 32), (33, 200), (64, 64), (40, 32)]  # height, width


def make_image(seed, height, width):
    """Smooth, with edges and a little noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(0, 3, (height, width, 3))
    image[height // 3:, width // 2:] *= 0.7
    return np.clip(image, 0, 255).astype(np.uint8)


def encode(image, kind='JPEG', **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def make_folder(directory, examples, split='train'):
    """A folder of (bytes, class) in order; the classes must rise."""
    for i, (encoded, label) in enumerate(examples):
        path = directory / split / f'class{label}' / f'{i:05d}.JPEG'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    return directory


def records(target, split='train'):
    """(bytes, label) of every record, by TensorFlow alone."""
    features = {'image/encoded': tf.io.FixedLenFeature([], tf.string),
                'image/class/label': tf.io.FixedLenFeature([], tf.int64)}
    parsed = [tf.io.parse_single_example(record, features)
              for record in tf.data.TFRecordDataset(sorted(map(str, target.glob(f'{split}-?????-of-?????'))))]
    return [(example['image/encoded'].numpy(), int(example['image/class/label'])) for example in parsed]


def rewrite(path, change):
    """The records of a shard become change(list of them), with right checksums."""
    kept = [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in change(kept):
            writer.write(record)


def with_features(record, image=None, label=None):
    example = tf.train.Example.FromString(record)
    if image is not None:
        example.features.feature['image/encoded'].bytes_list.value[0] = image
    if label is not None:
        example.features.feature['image/class/label'].int64_list.value[0] = label
    return example.SerializeToString()


@pytest.fixture
def reencode(capsys, tmp_path):
    """reencode(*flags) -> (exit code, stderr), from tmp_path/source to tmp_path/target if nothing else is said."""
    def run(*arguments):
        spec = importlib.util.spec_from_file_location('reencode', ROOT / 'launch/reencode.py')
        module = importlib.util.module_from_spec(spec)  # anew: flags would stay set
        spec.loader.exec_module(module)
        capsys.readouterr()
        code = module.main(['reencode.py', '--name=folder', f'--data_dir={tmp_path / "source"}',
                            f'--target_dir={tmp_path / "target"}', f'--short_side={SHORT_SIDE}', *arguments])
        captured = capsys.readouterr()
        assert captured.out == ''
        return code, captured.err

    return run


@pytest.fixture(scope='module')
def examples():
    """28 JPEGs of four classes, of all SIZES."""
    return [(encode(make_image(i, *SIZES[i % 7]), quality=95), i // 7) for i in range(28)]


@pytest.fixture
def made(tmp_path, examples, reencode):
    """The target of a finished run, four shards of seven."""
    make_folder(tmp_path / 'source', examples)
    code, stderr = reencode('--num_shards=4')
    assert code == 0, stderr
    return tmp_path / 'target'


def assert_refused(result, *words):
    code, stderr = result
    assert code == 2, stderr
    assert stderr.splitlines()[-1].startswith('error: ') and stderr.count('error: ') == 1
    for word in words:
        assert str(word) in stderr.splitlines()[-1], stderr


# What comes out

def test_labels_order_and_sizes(made, examples, tmp_path):
    assert len(list(made.glob('train-?????-of-00004'))) == 4 and not list(made.glob('*.partial'))
    found = records(made)
    assert [label for _, label in found] == [label for _, label in examples]
    for (encoded, _), (original, _), (height, width) in zip(found, examples, itertools.cycle(SIZES)):
        if min(height, width) <= SHORT_SIDE:
            assert encoded == original
            continue
        image = Image.open(io.BytesIO(encoded))
        short = min(height, width)
        assert image.size == (SHORT_SIDE * width // short, SHORT_SIDE * height // short)
        assert image.format == 'JPEG' and image.layer[0][1:3] == (2, 2)  # 4:2:0
        assert image.quantization == Image.open(io.BytesIO(encode(make_image(0, 8, 8), quality=90))).quantization
        wanted = Image.open(io.BytesIO(original)).convert('RGB').resize(image.size, Image.Resampling.BICUBIC)
        # What the JPEG costs: little in luminance; chroma has half the pixels, and these images are small and gaudy.
        for mode, allowed in (('L', 1.5), ('RGB', 5)):
            difference = np.abs(np.asarray(image.convert(mode), float) - np.asarray(wanted.convert(mode), float))
            assert difference.mean() < allowed, (mode, difference.mean())
    source = input_pipeline.open_source('tfrecord', made, 'train')
    assert [source[i] for i in range(len(source))] == found and source.num_classes == 4


def test_an_epoch_of_batches_has_the_labels_of_the_source(made, examples, tmp_path):
    def epoch(name, directory):
        source = input_pipeline.open_source(name, directory, 'train')
        dataset = input_pipeline.train_dataset(source, global_batch_size=7, image_size=24, seed=3).take(4)
        return [{key: batch[key].numpy() for key in ('label', 'index', 'mask')} for batch in dataset]

    batches = epoch('tfrecord', made)
    for batch, wanted in zip(batches, epoch('folder', tmp_path / 'source'), strict=True):
        for key, value in wanted.items():
            np.testing.assert_array_equal(batch[key], value)
        assert batch['mask'].all()
        np.testing.assert_array_equal(batch['label'], [examples[i][1] for i in batch['index']])


def test_a_set_of_256_gives_evaluation_the_pixels_it_had(tmp_path, reencode):
    """But for a JPEG more."""
    make_folder(tmp_path / 'source', [(encode(make_image(i, 375, 500), quality=95), i) for i in range(2)])
    code, stderr = reencode('--short_side=256')
    assert code == 0, stderr
    assert len(list((tmp_path / 'target').glob('train-?????-of-00002'))) == 2  # no more than there are examples
    images = []
    for name, directory in (('folder', 'source'), ('tfrecord', 'target')):
        source = input_pipeline.open_source(name, tmp_path / directory, 'train')
        (batch,) = input_pipeline.eval_dataset(source, global_batch_size=2, image_size=224, resize=256)
        images.append(batch['image'].numpy().astype(np.float64))
    assert np.abs(images[0] - images[1]).mean() < 1.5


def test_no_jpeg_becomes_one_and_what_is_no_image_stays(tmp_path, examples, reencode):
    broken = {9: b'', 12: examples[12][0][:len(examples[12][0]) // 2], 20: b'<html>404</html>'}
    odd = [(broken.get(i, encoded), label) for i, (encoded, label) in enumerate(examples)]
    odd[2] = encode(make_image(2, 20, 30), 'PNG'), 0
    odd[7] = encode(make_image(7, 50, 40)[..., 0], quality=95), 1  # grey
    make_folder(tmp_path / 'source', odd)
    code, stderr = reencode('--num_shards=3')
    assert code == 0 and '3 that cannot be decoded' in stderr.splitlines()[-1], stderr
    found = records(tmp_path / 'target')
    assert [label for _, label in found] == [label for _, label in odd]
    assert {i: found[i][0] for i in broken} == broken
    png = Image.open(io.BytesIO(found[2][0]))
    assert png.format == 'JPEG' and png.size == (30, 20)
    grey = np.asarray(Image.open(io.BytesIO(found[7][0])).convert('RGB'))
    assert grey.shape == (40, 32, 3) and np.ptp(grey.astype(int), axis=2).max() <= 1
    assert reencode('--num_shards=3', '--verify')[0] == 0
    source = input_pipeline.open_source('tfrecord', tmp_path / 'target', 'train')
    bad = set()
    list(input_pipeline.eval_dataset(source, global_batch_size=7, image_size=24, resize=28,
                                     on_bad=lambda position, i: bad.add(i)))
    assert bad == set(broken)


def test_a_source_of_labels_from_one(tmp_path, made, reencode):
    """Such as many have ImageNet: what comes out counts from 0."""
    (tmp_path / 'ones').mkdir()
    for path in made.glob('train-?????-of-00004'):
        path.rename(tmp_path / 'ones' / path.name)
        rewrite(tmp_path / 'ones' / path.name,
                lambda kept: [with_features(record, label=1 + tf.train.Example.FromString(record).features.feature[
                    'image/class/label'].int64_list.value[0]) for record in kept])
    code, stderr = reencode('--name=tfrecord', f'--data_dir={tmp_path / "ones"}', f'--target_dir={tmp_path / "zeros"}')
    assert code == 0, stderr
    assert [label for _, label in records(tmp_path / 'zeros')] == [i // 7 for i in range(28)]


def test_a_split_without_class_0_needs_train_beside_it(tmp_path, examples, reencode):
    make_folder(make_folder(tmp_path / 'source', examples), [examples[8], examples[15]], 'validation')
    assert_refused(reencode('--split=validation'), 'class 0', "'train'", tmp_path / 'target')
    assert reencode()[0] == 0
    assert reencode('--split=validation')[0] == 0
    source = input_pipeline.open_source('tfrecord', tmp_path / 'target', 'validation')
    assert [source[i][1] for i in range(len(source))] == [1, 2]


# Stopped and started again

def test_stopped_and_killed_it_goes_on_where_it_was(tmp_path, reencode):
    image = encode(make_image(0, 375, 500), quality=95)
    make_folder(tmp_path / 'source', [(image, i // 200) for i in range(600)])
    target = tmp_path / 'target'
    command = [sys.executable, 'launch/reencode.py', '--name=folder', f'--data_dir={tmp_path / "source"}',
               f'--target_dir={target}', f'--short_side={SHORT_SIDE}', '--num_shards=150']
    before, kept = 0, {}
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 42)):
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)},
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(list(target.glob('train-?????-of-00150'))) < before + 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == code and stdout == '' and 'Traceback' not in stderr, stderr
        assert code != 42 or stderr.splitlines()[-1].startswith('stopped'), stderr
        whole = {path: path.stat().st_mtime_ns for path in target.glob('train-?????-of-00150')}
        assert kept.items() <= whole.items()
        before, kept = len(whole), whole
    assert before < 150
    code, stderr = reencode('--num_shards=150')
    assert code == 0 and f'of {600 - 4 * before} images' in stderr and 'of 600 images' in stderr, stderr
    first, *others = sorted(kept)
    assert all(path.stat().st_mtime_ns == kept[path] for path in others)  # the first is only made to look new
    assert not list(target.glob('*.partial'))
    found = records(target)
    assert [label for _, label in found] == [i // 200 for i in range(600)] and len(set(found)) == 3


# Damage

def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    'a flipped bit': flip,
    'cut off': lambda path: path.write_bytes(path.read_bytes()[:-20]),
    'a record less': lambda path: rewrite(path, lambda kept: kept[:-1]),
    'a record twice': lambda path: rewrite(path, lambda kept: kept[:1] + kept),
    'another label': lambda path: rewrite(path, lambda kept: [*kept[:3], with_features(kept[3], label=2), *kept[4:]]),
    'no image': lambda path: rewrite(path, lambda kept: [with_features(kept[0], image=b'\xff\xd8\xff'), *kept[1:]]),
    'too large': lambda path: rewrite(path, lambda kept: [
        with_features(kept[0], image=encode(make_image(1, 64, 64))), *kept[1:]]),
    'missing': lambda path: path.unlink(),
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('shard', [1, 3])
def test_damage_is_found_and_repaired(made, reencode, damage, shard):
    path = made / f'train-0000{shard}-of-00004'
    whole = {other: other.read_bytes() for other in made.glob('train-?????-of-00004')}
    stat = path.stat()
    assert reencode('--num_shards=4', '--verify')[0] == 0
    DAMAGES[damage](path)
    if path.exists():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk would do it
    assert_refused(reencode('--num_shards=4', '--verify'), path.name)
    if damage != 'missing':
        assert_refused(reencode('--num_shards=4'), path.name)  # what is there is not trusted either
        path.unlink()
    code, stderr = reencode('--num_shards=4')
    assert code == 0, stderr
    assert {other: other.read_bytes() for other in made.glob('train-?????-of-00004')} == whole


# Mistakes

@pytest.mark.parametrize(('flags', 'words'), [
    (['--short_side=48'], ['short_side 32, not 48', '--target_dir']), (['--quality=80'], ['quality 90, not 80']),
    (['--num_shards=5'], ['num_shards 4, not 5']), (['--name=tfrecord'], ['source', 'train']),
    (['--num_shards=29'], ['29', '28']), (['--short_side=31'], ['short_side', '31', '32']),
    (['--quality=101'], ['quality', '101']), (['--split=test'], ['test', 'train']), (['stray'], ["'stray'"]),
    (['--shrot_side=48'], ['shrot_side', 'short_side']), (['--target_dir=gs://bucket/x'], ['gs://bucket/x', 'local']),
    (['--data_dir=nowhere'], ['nowhere']), (['--target_dir=nowhere', '--verify'], ['nowhere'])])
def test_mistakes_end_in_one_line_and_touch_nothing(made, reencode, snapshot, flags, words):
    before = snapshot(made)
    code, stderr = reencode('--num_shards=4', *flags)
    assert stderr.count('\n') == 1
    assert_refused((code, stderr), *words)
    assert snapshot(made) == before and not (made.parent / 'nowhere').exists()


def test_what_is_missing_or_of_others(tmp_path, examples, reencode, made):
    make_folder(tmp_path / 'source', examples[:1], 'other')
    (made / 'train.reencode.json').unlink()
    assert_refused(reencode('--num_shards=4'), 'short_side None', '--target_dir')
    (made / 'train.reencode.json').write_text('{"name"')
    assert_refused(reencode('--num_shards=4'), 'train.reencode.json', 'damaged')
    assert reencode('--split=other')[0] == 0  # one directory may hold several
    with open(made / 'other.reencode.json') as file:
        assert json.load(file)['short_side'] == SHORT_SIDE
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_refused(reencode('--split=other'), 'other.reencode.json', 'another process')
