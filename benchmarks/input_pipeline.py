"""How many images a second input_pipeline delivers, beside other ways to feed a network, on this machine's CPU.

    python benchmarks/input_pipeline.py --other_python=torch-env/bin/python

All read the same JPEGs (input_pipeline_others.py says how they and the other environment are made) from TFRecord
shards or a folder that the system has in memory; take a random part of 0.08 to 1 of the area and 3/4 to 4/3 in aspect;
resize it bilinearly to --image_size; mirror half of the images; and leave batches of 128 in uint8 in host memory, read
ahead. All use as many threads or worker processes as there are cores. They take turns, see turns.py. What differs:
  ours                     train_dataset: exact inverse DCT, chroma not smoothed, not antialiased; in an order that
                           is a function of position
  plain tf.data            sequential TFRecords as the guides of TensorFlow say: interleaved shards, a shuffle buffer of
                           1,000, AUTOTUNE, order not kept; not antialiased, fast inverse DCT. Its windows come from
                           sample_distorted_bounding_box: 0.37 of the area on the average, all others' 0.43
  ..., uniform windows     the same with windows as all others
  DALI                     told not to antialias and to take the fast inverse DCT; reads the folder
  DALI, its defaults       antialiased, exact inverse DCT
  torchvision v2           decode_image to tensors, antialiased by default; and not antialiased. Decodes whole images
  torchvision v1, PIL      ImageFolder as it is: antialiased, decodes whole images
  bare decoding            whole images from memory, each into the same buffer; nothing else
  bare crop and decode     decode_and_crop_jpeg of the windows that ours takes, in a map over bytes in memory
  bare decode and resize   what ours calls of simplejpeg and OpenCV, over bytes in memory, and nothing else; at 224 px
                           alone, as it decodes nothing at a half of its size

With --augment=rand those that have a RandAugment, which comes last:
  ours                     timm's rand-m9-mstd0.5: two operations, each by a chance of 0.5, bilinear or bicubic
  ours, four layers        as many operations as torchvision's on the average
  torchvision v2, ...      RandAugment(num_ops=2, magnitude=9) on tensors, to the nearest pixel
  torchvision v1, PIL      timm's rand-m9-mstd0.5

Needs the machine for itself: about 10 s a contestant and round. Prints a JSON object for each contestant (its 'mean'
grey level tells that all see the same images) and measurement ('cores_taken': by anything else, which spoils it), then
a table and one JSON object: medians over the rounds of the rate and of ours divided by it.
"""
import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from input_pipeline_bounds import crop_and_decode, decode_and_resize
from input_pipeline_others import BATCH, NUM_CORES, OTHER_AUGMENTED, OTHER_CONTESTANTS, RATIO, SCALE
from turns import serve, take_turns

ROOT = Path(__file__).resolve().parent.parent
NUM_SHARDS = 8
OTHERS = Path(__file__).with_name('input_pipeline_others.py')


def write_shards(folder: Path, shard_dir: Path) -> None:
    """The images of folder/<class>/ in mixed order as train-?????-of-????? with labels from 1."""
    import tensorflow as tf

    paths = sorted(folder.glob('*/*.JPEG'))
    labels = {name: 1 + i for i, name in enumerate(sorted({path.parent.name for path in paths}))}
    random.Random(0).shuffle(paths)
    partial = shard_dir.with_name(shard_dir.name + '.partial')
    partial.mkdir(exist_ok=True)
    for shard in range(NUM_SHARDS):
        with tf.io.TFRecordWriter(str(partial / f'train-{shard:05d}-of-{NUM_SHARDS:05d}')) as writer:
            for path in paths[shard::NUM_SHARDS]:
                image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[path.read_bytes()]))
                label = tf.train.Feature(int64_list=tf.train.Int64List(value=[labels[path.parent.name]]))
                features = tf.train.Features(feature={'image/encoded': image, 'image/class/label': label})
                writer.write(tf.train.Example(features=features).SerializeToString())
    partial.rename(shard_dir)


def ours(shard_dir: Path, image_size: int, *, num_layers: int = 0) -> Iterator:
    """This project's; `num_layers` of RandAugment, or none."""
    import input_pipeline

    source = input_pipeline.open_source('tfrecord', str(shard_dir), 'train')
    augment = input_pipeline.make_rand_augment(num_layers=num_layers) if num_layers else None
    for batch in input_pipeline.train_dataset(source, global_batch_size=BATCH, image_size=image_size, augment=augment):
        yield batch['image']


def plain(shard_dir: Path, image_size: int, *, uniform_windows: bool = False) -> Iterator:
    """tf.data with the means of TensorFlow alone, but for `uniform_windows`."""
    import tensorflow as tf

    def choose_window(shape):
        if uniform_windows:
            return uniform_window(shape[:2])
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape, tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), min_object_covered=0.0, area_range=SCALE,
            aspect_ratio_range=RATIO, max_attempts=10, use_image_if_no_bounding_boxes=True)
        return tf.concat([begin[:2], size[:2]], 0)

    def to_example(record):
        features = tf.io.parse_single_example(record, {'image/encoded': tf.io.FixedLenFeature([], tf.string),
                                                       'image/class/label': tf.io.FixedLenFeature([], tf.int64)})
        encoded = features['image/encoded']
        window = choose_window(tf.image.extract_jpeg_shape(encoded))
        image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3, dct_method='INTEGER_FAST')
        image = tf.cast(tf.image.resize(image, [image_size, image_size]) + 0.5, tf.uint8)
        return tf.image.random_flip_left_right(image), features['image/class/label'] - 1

    dataset = tf.data.Dataset.list_files(str(shard_dir / 'train-*-of-*')).repeat()
    dataset = dataset.interleave(tf.data.TFRecordDataset, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
    dataset = dataset.shuffle(1000).map(to_example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
    for images, _ in dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE):
        yield images


def uniform_window(sides):
    """input_pipeline.preprocess.crop_window by TensorFlow, but for the rounding: int32 [top, left, height, width]."""
    import tensorflow as tf

    sides = tf.cast(sides, tf.float32)
    area = tf.reduce_prod(sides) * tf.random.uniform([10], *SCALE)
    aspect = tf.exp(tf.random.uniform([10], math.log(RATIO[0]), math.log(RATIO[1])))
    tries = tf.round(tf.sqrt(tf.stack([area / aspect, area * aspect], axis=1)))
    fits = tf.reduce_all((tries > 0) & (tries <= sides), axis=1)
    central = tf.minimum(sides, tf.round(sides[::-1] * [1 / RATIO[0], RATIO[1]]))
    window = tf.where(tf.reduce_any(fits), tries[tf.argmax(fits)], central)
    place = tf.floor(tf.random.uniform([2]) * (sides - window + 1))
    return tf.cast(tf.concat([place, window], 0), tf.int32)


# name -> (what makes its batches, changed settings)
CONTESTANTS = {
    'ours': (ours, {}),
    'ours, 128 px': (ours, {'image_size': 128}),
    'plain tf.data': (plain, {}),
    'plain tf.data, uniform windows': (plain, {'uniform_windows': True}),
    'bare crop and decode': (crop_and_decode, {}),
    'bare decode and resize': (decode_and_resize, {}),
}
# The same with --augment=rand.
AUGMENTED = {
    'ours, RandAugment': (ours, {'num_layers': 2}),
    'ours, RandAugment, four layers': (ours, {'num_layers': 4}),
}


def compare(flags: argparse.Namespace) -> None:
    """Makes the data where they are missing, measures, prints."""
    folder, shard_dir = flags.data_dir / 'folder' / 'train', flags.data_dir / 'tfrecord'
    if not folder.is_dir():
        subprocess.run([flags.other_python, OTHERS, f'--make_images={folder}'], check=True)
    if not shard_dir.is_dir():
        write_shards(folder, shard_dir)
    sizes = [path.stat().st_size for path in folder.rglob('*.JPEG')]

    here, others = (AUGMENTED, OTHER_AUGMENTED) if flags.augment else (CONTESTANTS, OTHER_CONTESTANTS)
    programs = dict.fromkeys(here, (sys.executable, __file__)) | dict.fromkeys(others, (flags.other_python, OTHERS))
    commands = {name: [python, str(script), f'--contestant={name}', f'--data_dir={flags.data_dir}',
                       f'--image_size={flags.image_size}'] for name, (python, script) in programs.items()}
    measured, versions = {name: [] for name in commands}, {}
    for report in take_turns(commands, flags.rounds, flags.secs):
        print(json.dumps(report), flush=True)
        versions |= report.get('versions', {})
        if 'images_per_sec' in report:
            measured[report['contestant']].append(report)

    def column(name: str, key: str) -> list[float]:
        return [report[key] for report in measured[name]]

    summary, first = {}, next(iter(here))
    for name in commands:
        rates = column(name, 'images_per_sec')
        ratios = [a / b for a, b in zip(column(first, 'images_per_sec'), rates, strict=True)]
        summary[name] = {'median': statistics.median(rates), 'min': min(rates), 'max': max(rates),
                         'cores_used': statistics.median(column(name, 'cores_used')),
                         'cores_taken': max(column(name, 'cores_taken')),
                         'ours_by_it': round(statistics.median(ratios), 3)}
    print(f'{"images a second":46}{"median":>8}{"min":>8}{"max":>8}{"cores":>8}{"taken":>8}{"ours / it":>11}')
    for name, row in summary.items():
        print(f'{name:46}{row["median"]:8.0f}{row["min"]:8.0f}{row["max"]:8.0f}{row["cores_used"]:8.2f}'
              f'{row["cores_taken"]:8.2f}{row["ours_by_it"]:11.2f}')
    print(json.dumps({'num_cores': NUM_CORES, 'rounds': flags.rounds, 'secs': flags.secs,
                      'image_size': flags.image_size, 'num_images': len(sizes),
                      'mean_kb': round(statistics.mean(sizes) / 1e3, 1), 'versions': versions,
                      'images_per_sec': summary}))


def main() -> None:
    """Reads the flags; compares, or serves as one contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--other_python', help='the Python that has torchvision, DALI, simplejpeg')
    parser.add_argument('--data_dir', type=Path, default=Path(tempfile.gettempdir()) / 'input_pipeline')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--secs', type=float, default=6.0, help='of a measurement')
    parser.add_argument('--image_size', type=int, default=224)
    parser.add_argument('--augment', choices=['rand'])
    parser.add_argument('--contestant', choices=CONTESTANTS | AUGMENTED, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    sys.path.insert(0, str(ROOT))
    if flags.contestant:
        import tensorflow as tf

        make, changed = (CONTESTANTS | AUGMENTED)[flags.contestant]
        settings = {'image_size': flags.image_size} | changed
        serve(make(flags.data_dir / 'tfrecord', **settings), versions={'tensorflow': tf.__version__})
    elif not flags.other_python:
        parser.error('--other_python is missing: a Python with the packages of input_pipeline_others.py')
    else:
        compare(flags)


if __name__ == '__main__':
    main()
