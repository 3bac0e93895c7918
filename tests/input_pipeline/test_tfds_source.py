"""What TFDS prepared is read through our own index, and equals the same images in any other form, bit for bit."""

import io
import itertools
import os

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from etils.epath import gpath, register
from source_harness import assert_data_error

import input_pipeline
from input_pipeline import sources

CLASSES = ['ant', 'bee', 'cat', 'dog']


class ThreeForms(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images given by the test, in the order given."""

    VERSION = tfds.core.Version('1.2.0')
    examples = {}
    features = None
    supervised = ('image', 'label')

    def _info(self):
        features = self.features or {'image': tfds.features.Image(), 'label': tfds.features.ClassLabel(names=CLASSES)}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features),
                                              supervised_keys=self.supervised, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.examples}

    def _generate_examples(self, split):
        yield from enumerate(self.examples[split])


@pytest.fixture(scope='module')
def images(photo, encode):
    """31 JPEGs and two PNGs, sorted by class."""
    encoded = [encode(photo(i, 30 + i, 50 - i), 'PNG' if i in (4, 20) else 'JPEG') for i in range(33)]
    return [(image, i * 4 // 33) for i, image in enumerate(encoded)]


def prepare(data_dir, examples, file_format='tfrecord', features=None, supervised=('image', 'label')):
    ThreeForms.examples, ThreeForms.features, ThreeForms.supervised = examples, features, supervised
    builder = ThreeForms(data_dir=data_dir, file_format=file_format)
    config = tfds.download.DownloadConfig(num_shards=min(3, *map(len, examples.values())))
    builder.download_and_prepare(download_config=config)


def as_tfds(images):
    return [{'image': io.BytesIO(encoded), 'label': label} for encoded, label in images]


@pytest.fixture(scope='module', params=['tfrecord', 'array_record'])
def data_dir(request, tmp_path_factory, images):
    path = tmp_path_factory.mktemp(request.param)
    prepare(path, {'train': as_tfds(images), 'test': as_tfds(images[5:12])}, request.param)
    return path


def test_bytes_and_labels_are_those_that_were_prepared(data_dir, images):
    for split, wanted in (('train', images), ('test', images[5:12])):
        source = input_pipeline.open_source('tfds:three_forms', data_dir, split)
        assert [source[i] for i in range(len(source))] == wanted
        assert list(source.class_names) == CLASSES
    assert 'three_forms' in source.where(0)


@pytest.fixture
def ram(monkeypatch):
    """ram:// stands for gs://: TFDS' paths are told that TensorFlow reads it, as they know of gs://."""
    monkeypatch.setattr(gpath, '_URI_PREFIXES', (*gpath._URI_PREFIXES, 'ram://'))
    monkeypatch.setattr(gpath, '_URI_SCHEMES', gpath._URI_SCHEMES | {'ram'})
    monkeypatch.setitem(gpath._URI_MAP_ROOT, 'ram://', '/ram/')
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, 'ram', None)
    monkeypatch.setitem(register._URI_PREFIXES_TO_CLS, 'ram://', gpath.PosixGPath)
    monkeypatch.setattr(sources, '_TFDS_REMOTE', 'ram://')


def test_what_tfds_prepared_is_read_from_a_remote_file_system(tmp_path, images, ram, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    prepare(tmp_path / 'local', {'train': as_tfds(images)})
    place = 'three_forms/1.2.0'
    tf.io.gfile.makedirs(f'ram://{tmp_path.name}/{place}')
    for name in os.listdir(tmp_path / 'local' / place):
        tf.io.gfile.copy(str(tmp_path / 'local' / place / name), f'ram://{tmp_path.name}/{place}/{name}')
    for split, rows in (('train', slice(None)), ('train[7:25]', slice(7, 25))):
        source = input_pipeline.open_source('tfds:three_forms', f'ram://{tmp_path.name}', split)
        assert [source[i] for i in range(len(source))] == images[rows]
    assert len(list((tmp_path / 'cache' / 'ghostnet').iterdir())) == 1  # a part has the shards of the whole
    for prepare_it in (False, True):
        with pytest.raises(input_pipeline.DataError, match='not prepared in ram://.*prepared there: three_forms 1.2.0'):
            input_pipeline.open_source('tfds:three_forms:9.9.9', f'ram://{tmp_path.name}', 'train', prepare=prepare_it)
    tf.io.gfile.remove(source.where(0).partition(' ')[0])
    with pytest.raises(input_pipeline.DataError, match='missing 1 of 3 files'):
        input_pipeline.open_source('tfds:three_forms', f'ram://{tmp_path.name}', 'train')


def test_order_is_that_of_tfds_itself(tmp_path, images):
    prepare(tmp_path, {'train': as_tfds(images)})
    read = tfds.builder_from_directory(tmp_path / 'three_forms' / '1.2.0').as_dataset(
        split='train', decoders={'image': tfds.decode.SkipDecoding()})
    source = input_pipeline.open_source('tfds:three_forms', tmp_path, 'train')
    wanted = [(example['image'].numpy(), int(example['label'])) for example in read]
    assert [source[i] for i in range(len(source))] == wanted


@pytest.mark.parametrize('name', ['three_forms', 'three_forms:1.2.0', 'three_forms:1.*.*'])
def test_versions(data_dir, name):
    assert len(input_pipeline.open_source(f'tfds:{name}', data_dir, 'test')) == 7


@pytest.mark.parametrize(('split', 'rows'), [('train[:10]', slice(0, 10)), ('train[7:25]', slice(7, 25)),
                                             ('train[50%:]', slice(16, None)), ('train[:50%]', slice(0, 16))])
def test_parts_of_splits(data_dir, images, split, rows):
    for _ in range(2):
        source = input_pipeline.open_source('tfds:three_forms', data_dir, split)
        assert [source[i] for i in range(len(source))] == images[rows]


def test_joined_splits(data_dir, images):
    source = input_pipeline.open_source('tfds:three_forms', data_dir, 'test+train[30:]')
    assert [source[i] for i in range(len(source))] == images[5:12] + images[30:]


@pytest.fixture(scope='module')
def other_forms(tmp_path_factory, images, write_tfrecords):
    """The images of `data_dir` as bare TFRecords with labels from 1, and as a folder."""
    records, folder = tmp_path_factory.mktemp('records'), tmp_path_factory.mktemp('folder')
    for split, examples in (('train', images), ('test', images[5:12])):
        write_tfrecords(records, split, [(encoded, label + 1) for encoded, label in examples], 5)
        for i, (encoded, label) in enumerate(examples):
            path = folder / split / CLASSES[label] / f'{i:03d}.JPEG'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)
    return [('tfrecord', records), ('folder', folder)]


def test_all_forms_give_the_same_batches_bit_for_bit(data_dir, other_forms):
    def batches(name, place):
        source, test_source = (input_pipeline.open_source(name, place, split) for split in ('train', 'test'))
        train = input_pipeline.train_dataset(source, global_batch_size=10, image_size=32, seed=5)
        evaluation = input_pipeline.eval_dataset(test_source, global_batch_size=4, image_size=32, resize=40)
        return [{key: x.numpy() for key, x in batch.items()}
                for batch in itertools.chain(itertools.islice(train, 7), evaluation)]

    wanted = batches('tfds:three_forms', data_dir)
    assert len(wanted) == 7 + 2
    assert all(batch['mask'].any() for batch in wanted)
    for name, place in other_forms:
        for batch, other in zip(wanted, batches(name, place), strict=True):
            for key in batch:
                np.testing.assert_array_equal(batch[key], other[key])


def test_unprepared_imagenet_says_which_files_to_put_where(tmp_path):
    assert_data_error(['ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar', tmp_path / 'downloads' / 'manual',
                       f"tfds.builder('imagenet2012', data_dir='{tmp_path}').download_and_prepare()"],
                      'tfds:imagenet2012', tmp_path)
    assert_data_error(["tfds.builder('imagenet2012:5.1.0'"], 'tfds:imagenet2012:5.1.0', tmp_path / 'nowhere')


def test_unprepared_sets_say_what_to_run(tmp_path, data_dir):
    assert_data_error([tmp_path, f"tfds.builder('fashion_mnist', data_dir='{tmp_path}')"], 'tfds:fashion_mnist',
                      tmp_path)
    assert_data_error(["'fashion_mnits'", "did you mean 'fashion_mnist'"], 'tfds:fashion_mnits', tmp_path)
    assert_data_error(["'zzqqzz'", 'prepare your own builder'], 'tfds:zzqqzz', tmp_path)
    assert_data_error([data_dir, 'prepared there: three_forms 1.2.0'], 'tfds:three_forms:9.9.9', data_dir)
    assert_data_error(['ab c/d:e:f'], 'tfds:ab c/d:e:f', tmp_path)


def test_unknown_splits_are_listed(data_dir):
    assert_data_error(['three_forms', 'validation', 'train, test'], 'tfds:three_forms', data_dir, 'validation')
    assert_data_error(['train[1000%:'], 'tfds:three_forms', data_dir, 'train[1000%:')
    assert_data_error(['train[:0]', 'empty'], 'tfds:three_forms', data_dir, 'train[:0]')


def test_sets_that_do_not_classify_images(tmp_path, images):
    prepare(tmp_path, {'train': [{'text': 'x', 'label': 0}]}, supervised=None, features={
        'text': tfds.features.Text(), 'label': tfds.features.ClassLabel(names=CLASSES)})
    assert_data_error(['one image and one class label', 'text (Text)'], 'tfds:three_forms', tmp_path)


def test_keys_come_from_the_types_when_nothing_says_which(tmp_path, images):
    prepare(tmp_path, {'train': [{'id': 'x', 'picture': example['image'], 'kind': example['label']}
                                 for example in as_tfds(images)]}, supervised=None,
            features={'id': tfds.features.Text(), 'picture': tfds.features.Image(shape=(None, None, 3)),
                      'kind': tfds.features.ClassLabel(names=CLASSES)})
    source = input_pipeline.open_source('tfds:three_forms', tmp_path, 'train')
    assert [source[i] for i in range(len(source))] == images


@pytest.mark.parametrize('file_format', ['tfrecord', 'array_record'])
def test_a_split_without_labels(tmp_path, images, file_format):
    unlabelled = [(encoded, -1) for encoded, _ in images[:3]]
    prepare(tmp_path, {'train': as_tfds(images), 'test': as_tfds(unlabelled)}, file_format)
    assert_data_error(['test', 'labels are out of range', 'class -1'], 'tfds:three_forms', tmp_path, 'test')


@pytest.mark.parametrize('file_format', ['tfrecord', 'array_record'])
def test_images_that_are_none_are_masked(tmp_path, images, file_format):
    bad = images.copy()
    for index, encoded in ((3, b''), (11, images[11][0][:200]), (30, b'<html>')):
        bad[index] = encoded, images[index][1]
    streams = []
    for name, examples in (('good', images), ('bad', bad)):
        prepare(tmp_path / name, {'train': as_tfds(examples)}, file_format)
        source = input_pipeline.open_source('tfds:three_forms', tmp_path / name, 'train')
        dataset = input_pipeline.train_dataset(source, global_batch_size=11, image_size=24)
        batches = [{key: x.numpy() for key, x in batch.items()} for batch in itertools.islice(dataset, 3)]
        streams.append({key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]})
    is_bad = np.isin(streams[1]['index'], [3, 11, 30])
    np.testing.assert_array_equal(streams[1]['mask'], ~is_bad)
    for key in ('image', 'label', 'index'):
        np.testing.assert_array_equal(streams[1][key][~is_bad], streams[0][key][~is_bad])


def test_a_shard_that_is_not_the_prepared_one(tmp_path, images):
    prepare(tmp_path, {'train': as_tfds(images)})
    (shard,) = (tmp_path / 'three_forms' / '1.2.0').glob('*.tfrecord-00001-of-00003')
    with tf.io.TFRecordWriter(str(shard)) as writer:
        for record in itertools.islice(tf.data.TFRecordDataset(str(shard).replace('00001-of', '00000-of')), 3):
            writer.write(record.numpy())
    assert_data_error([shard, 'holds 3 records', 'dataset_info.json says'], 'tfds:three_forms', tmp_path)
    os.remove(shard)
    assert_data_error([shard, 'missing'], 'tfds:three_forms', tmp_path)


def test_shapes_are_generated_once_and_then_only_read(tmp_path, images, monkeypatch, capfd):
    monkeypatch.setattr('input_pipeline.shapes.Shapes', ThreeForms)  # the real one takes seconds
    ThreeForms.examples, ThreeForms.features = {'train': as_tfds(images), 'test': as_tfds(images[:3])}, None
    assert len(input_pipeline.open_source('shapes', tmp_path / 'new', 'train')) == 33
    monkeypatch.setattr(ThreeForms, '_generate_examples', None)
    os.remove(tmp_path / 'new' / '.preparing.lock')
    assert len(input_pipeline.open_source('shapes', tmp_path / 'new', 'test')) == 3
    assert not (tmp_path / 'new' / '.preparing.lock').exists()
    assert capfd.readouterr().out == ''
    (tmp_path / 'file').touch()
    assert_data_error(['cannot prepare data', tmp_path / 'file'], 'shapes', tmp_path / 'file')


def test_a_set_that_is_not_there_is_prepared_only_when_that_is_asked_for(tmp_path, images, monkeypatch):
    ThreeForms.examples, ThreeForms.features = {'train': as_tfds(images)}, None
    monkeypatch.setattr('tensorflow_datasets.builder', lambda name, data_dir: ThreeForms(data_dir=data_dir))
    assert_data_error(['not prepared'], 'tfds:three_forms', tmp_path / 'new')
    assert len(input_pipeline.open_source('tfds:three_forms', tmp_path / 'new', 'train', prepare=True)) == 33
