"""Data sets that TFDS has prepared, as TFRecord or ArrayRecord, as a source."""
import contextlib
import difflib
import fcntl
import os
import sys
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from input_pipeline.sources.arrayrecord import make_record_source
from input_pipeline.sources.record_index import load_record_index
from input_pipeline.sources.source import DataError, Source
from input_pipeline.sources.tfrecord import check_labels, make_indexed_source


def open_tfds(name: str, data_dir: str, split: str, *, prepare: bool = False) -> Source:
    """Opens split `split` (also 'train[:90%]') of NAME[/CONFIG][:VERSION] as TFDS prepared it in DATA_DIR.

    `prepare`: whether TFDS may download and prepare what is not there. Raises DataError if the set is unknown or not
    prepared, has no such split, or is no image classification set.
    """
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        if not prepare or '://' in data_dir:
            raise DataError(_how_to_prepare(name, data_dir)) from error
        builder = _prepare(lambda: tfds.builder(name, data_dir=data_dir), data_dir)
    return _open_builder(builder, split)


def open_shapes(data_dir: str, split: str) -> Source:
    """Opens the embedded data set, which is generated in DATA_DIR if it is not there."""
    from input_pipeline.shapes import Shapes  # its module draws: only this source needs it
    builder = Shapes(data_dir=data_dir)
    if not builder.data_path.exists():
        builder = _prepare(lambda: Shapes(data_dir=data_dir), data_dir)
    return _open_builder(builder, split)


def _prepare(make_builder: Callable[[], tfds.core.DatasetBuilder], data_dir: str) -> tfds.core.DatasetBuilder:
    try:
        os.makedirs(data_dir, exist_ok=True)
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        # Of workers that start at once one prepares, the others wait. TFDS prints to stdout, which is for results.
        with open(os.path.join(data_dir, '.preparing.lock'), 'w') as lock, contextlib.redirect_stdout(sys.stderr):
            fcntl.flock(lock, fcntl.LOCK_EX)
            builder = make_builder()
            builder.download_and_prepare()
    except OSError as error:  # those of the network are OSErrors too
        raise DataError(f'cannot prepare data in {data_dir}: {str(error).splitlines()[0]}; --data_dir must be a '
                        'directory that can be written, and a download needs the network') from error
    return builder


def _open_builder(builder: tfds.core.DatasetBuilder, split: str) -> Source:
    info = builder.info
    what = f'tfds:{info.full_name.replace("/" + str(info.version), ":" + str(info.version))} {split}'
    has = f'{info.name} has: {", ".join(info.splits)}'
    try:
        instructions = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise DataError(f'{what}: no such split; {has}') from error
    if not instructions:
        raise DataError(f'{what}: the split is empty; {has}')
    paths = [os.fspath(instruction.filename) for instruction in instructions]
    # One listing: to ask for each of a thousand remote files takes a minute.
    present = set(tf.io.gfile.listdir(os.path.dirname(paths[0])))
    if missing := [path for path in paths if os.path.basename(path) not in present]:
        raise DataError(f'{what}: missing {len(missing)} of {len(paths)} files, such as {missing[0]}; prepare it again')
    image_key, label_key = _feature_keys(info, what)
    class_names = info.features[label_key].names
    if info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return make_record_source(what, instructions, image_key, label_key, class_names)
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise DataError(f'{what} is prepared as {info.file_format.value}; prepare it as tfrecord or array_record')
    index = load_record_index(paths, os.path.basename(paths[0]).partition('.')[0], image_key, label_key)
    shards = np.split(index, np.searchsorted(index[:, 0], np.arange(1, len(paths))))
    for path, records, instruction in zip(paths, shards, instructions):
        if len(records) != instruction.examples_in_shard:
            raise DataError(f'{what}: {path} holds {len(records)} records, dataset_info.json says '
                            f'{instruction.examples_in_shard}; prepare it again')
    index = np.concatenate([records[part.skip:part.skip + part.take] for records, part in zip(shards, instructions)])
    check_labels(index[:, 3], len(class_names), what, 'a split without labels cannot be used')
    return make_indexed_source(what, paths, index, class_names)


def _feature_keys(info: tfds.core.DatasetInfo, what: str) -> tuple[str, str]:
    """The features that hold image and label: the supervised keys if they are of these types, else the only ones."""
    features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    images = [key for key, feature in features.items()
              if isinstance(feature, tfds.features.Image) and feature.np_dtype in (np.uint8, np.uint16)]
    pairs = [(image, label) for image in images for label, feature in features.items()
             if isinstance(feature, tfds.features.ClassLabel)]
    pairs = [pair for pair in pairs if pair == info.supervised_keys] or pairs
    if len(pairs) != 1:
        raise DataError(f'{what}: wanted one image and one class label; its features are: '
                        + ', '.join(f'{key} ({type(feature).__name__})' for key, feature in features.items()))
    return pairs[0]


def _how_to_prepare(name: str, data_dir: str) -> str:
    base = name.partition('/')[0].partition(':')[0]
    known = tfds.list_builders(with_community_datasets=False)
    prepared = sorted(os.path.relpath(path, os.path.join(data_dir, base)) for path, _, files
                      in tf.io.gfile.walk(os.path.join(data_dir, base)) if 'dataset_info.json' in files)
    what = f'tfds:{name} is not prepared in {data_dir}'
    what += f' (prepared there: {base} {", ".join(prepared)})' if prepared else ''
    if base not in known:
        near = difflib.get_close_matches(base, known, n=1)
        return (f'{what}, and TFDS knows no data set {base!r}; '
                + (f'did you mean {near[0]!r}?' if near else 'prepare your own builder there first'))
    # Not `tfds build`: that command needs apache_beam, which nothing else here does.
    builder = f'tfds.builder({name!r}, data_dir={data_dir!r})'
    if base == 'imagenet2012':
        what += (': put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from image-net.org) in '
                 f'{os.path.join(data_dir, "downloads", "manual")}, then')
    return f'{what}: run: python -c "import tensorflow_datasets as tfds; {builder}.download_and_prepare()"'
