"""How long the input takes to start, to index shards, and how much memory it keeps.

    python benchmarks/input_start.py --data_dir=DIR [--gigabytes=10]

DIR, which must be on the disk to be measured, gets 1.3 GB and --gigabytes of TFRecord shards in its folders `million`
and `big`, once. Measured, each in a process of its own:
  index   of `big`, whose records are as large as ImageNet's, without a cache, beside a mere reading of the same shards
          by as many threads; both after the system has been told to forget the shards. In turns, --rounds times
  start   a batch of 256 at 224 px from the middle of the second epoch of 1,281,167 examples, with the index cached:
          from open_source to the batch in memory. TensorFlow has been imported before
  memory  resident memory of a process that reads 20 epochs of 2,048 examples of `big`, at the end of each epoch

Prints a JSON object for each measurement and one for all.
"""
import argparse
import dataclasses
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUM_EXAMPLES = 1_281_167  # ImageNet's training split
NUM_THREADS = 16  # of input_pipeline.sources.index_cache.in_parallel
BATCH, NUM_EPOCHS = 256, 20


def write_shards(folder: Path, images: list[bytes], num_examples: int, num_shards: int) -> None:
    """`num_examples` records of `images`, over and over, with labels 0..999."""
    import tensorflow as tf

    partial = folder.with_name(folder.name + '.partial')
    partial.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        with tf.io.TFRecordWriter(str(partial / f'train-{shard:05d}-of-{num_shards:05d}')) as writer:
            for i in range(shard, num_examples, num_shards):
                example = tf.train.Example()
                example.features.feature['image/encoded'].bytes_list.value.append(images[i % len(images)])
                example.features.feature['image/class/label'].int64_list.value.append(i % 1000)
                writer.write(example.SerializeToString())
    partial.rename(folder)


def make_images(count: int, side: int, quality: int) -> list[bytes]:
    """JPEGs of grain over a colour of its own each."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    return [cv2.imencode('.jpg', np.uint8(np.clip(rng.normal(rng.uniform(40, 216, 3), 24, [side * 3 // 4, side, 3]),
                                                  0, 255)), [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
            for _ in range(count)]


def forget(paths: list[Path]) -> None:
    """Has the system drop what it has in memory of these files."""
    for path in paths:
        with open(path, 'rb') as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(paths: list[Path]) -> None:
    """Reads the files to their end."""
    def read(path: Path) -> None:
        buffer = bytearray(1 << 20)
        with open(path, 'rb', buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(read, paths))


def measure(what: str, data_dir: Path) -> dict[str, object]:
    """One measurement, in this process."""
    import input_pipeline

    folder = data_dir / ('million' if what == 'start' else 'big')
    paths = sorted(folder.glob('train-*-of-*'))
    if what in ('index', 'read'):
        for cached in folder.glob('*.ghostnet-index.npz'):
            cached.unlink()
        forget(paths)
        started, used = time.perf_counter(), time.process_time()
        if what == 'index':
            input_pipeline.open_source('tfrecord', str(folder), 'train')
        else:
            read_all(paths)
        secs = time.perf_counter() - started
        return {'gb_per_sec': round(sum(path.stat().st_size for path in paths) / secs / 1e9, 3),
                'cores_used': round((time.process_time() - used) / secs, 2)}
    started = time.perf_counter()
    source = input_pipeline.open_source('tfrecord', str(folder), 'train')
    if what == 'start':
        opened = time.perf_counter()
        next(iter(input_pipeline.train_dataset(source, global_batch_size=BATCH, start_position=3 * len(source) // 2)))
        return {'examples': len(source), 'open_secs': round(opened - started, 2),
                'secs': round(time.perf_counter() - started, 2)}
    part, megabytes = dataclasses.replace(source, size=8 * BATCH), []
    batches = iter(input_pipeline.train_dataset(part, global_batch_size=BATCH))
    for _ in range(NUM_EPOCHS):
        for _ in range(len(part) // BATCH):
            next(batches)
        resident = int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
        megabytes.append(round(resident / 1e6, 1))
    return {'megabytes': megabytes, 'growth': round(megabytes[-1] / megabytes[1] - 1, 4),
            'peak': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)}


def main() -> None:
    """Makes the shards where they are missing, measures in processes of their own, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', type=Path, required=True)
    parser.add_argument('--gigabytes', type=float, default=10.0)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--measure', choices=['index', 'read', 'start', 'memory'], help=argparse.SUPPRESS)
    flags = parser.parse_args()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    sys.path.insert(0, str(ROOT))
    if flags.measure:
        print(json.dumps(measure(flags.measure, flags.data_dir)))
        return
    if not (flags.data_dir / 'million').is_dir():
        write_shards(flags.data_dir / 'million', make_images(1000, 32, 90), NUM_EXAMPLES, 64)
    if not (flags.data_dir / 'big').is_dir():
        images = make_images(500, 500, 88)
        size = statistics.mean(map(len, images))
        write_shards(flags.data_dir / 'big', images, int(flags.gigabytes * 1e9 / size), 32)
    order = random.Random(0)
    runs = [what for _ in range(flags.rounds) for what in order.sample(['index', 'read', 'start'], 3)] + ['start']
    found = {}
    for what in ['start', *runs, 'memory']:  # the first start makes the index
        command = [sys.executable, __file__, f'--measure={what}', f'--data_dir={flags.data_dir}']
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        found.setdefault(what, []).append(result)
        print(json.dumps({what: result}), flush=True)
    rates = {what: [run['gb_per_sec'] for run in found[what]] for what in ('index', 'read')}
    print(json.dumps({'index_gb_per_sec': statistics.median(rates['index']),
                      'read_gb_per_sec': statistics.median(rates['read']),
                      'index_by_read': round(statistics.median(
                          a / b for a, b in zip(rates['index'], rates['read'], strict=True)), 2),
                      'start_secs': [run['secs'] for run in found['start'][1:]],
                      'memory_growth': found['memory'][0]['growth']}))


if __name__ == '__main__':
    main()
