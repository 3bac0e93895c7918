"""Writes a data set once more with smaller JPEGs, so that every epoch of every run reads and decodes less.

    python launch/reencode.py --name=tfds:imagenet2012 --data_dir=DIR --split=train --target_dir=OUT --short_side=256

It stands in launch/ because it is a command run by hand and no part of the three packages. What comes out is read with
data.name = 'tfrecord' and --data_dir=OUT: the same examples in the same order, with the same labels, from 0.

The shorter side becomes --short_side, the longer one is in proportion, rounded down, by Pillow's bicubic resampling,
which averages where it shrinks (antialiasing): evaluation does just that, and eval_dataset.resize = 256 takes pixels of
a set of 256 as they are. JPEGs are 4:2:0. One that is no larger stays byte for byte; so does what cannot be decoded,
which the trainer masks. A shard gets its name when it is whole, and the same command goes on where it was stopped. At
the end all is read back beside the source: checksums, that images decode, sizes, labels. --verify does that alone.

Exit codes: 0 done; 2 the user's mistake, or a damaged shard; 42 stopped by SIGTERM or SIGINT, whole shards are kept.
"""
import contextlib
import fcntl
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from trainer.main import import_tensorflow


def _stop(*_) -> None:
    os.write(2, b'\nstopped; whole shards are kept: the same command goes on\n')
    os._exit(42)  # at once, whatever the threads are writing: it has no name yet


if __name__ == '__main__':  # before what takes seconds
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
import_tensorflow()  # without what it writes to stderr
import tensorflow as tf  # noqa: E402

from input_pipeline import DataError, Source, open_source  # noqa: E402
from input_pipeline.preprocess import decode  # noqa: E402
from trainer.checkpoint import flush  # noqa: E402

_FLAGS = flags.FlagValues()  # its own: the trainer's are of no use here
flags.DEFINE_string('name', None, 'The data source, as data.name.', _FLAGS, required=True)
flags.DEFINE_string('data_dir', None, 'Where it is.', _FLAGS, required=True)
flags.DEFINE_string('split', 'train', 'Which split of it.', _FLAGS)
flags.DEFINE_string('target_dir', None, 'Local directory to write to; splits may share it.', _FLAGS, required=True)
flags.DEFINE_integer('short_side', 256, 'Pixels of the shorter side.', 32, None, _FLAGS)
flags.DEFINE_integer('quality', 90, 'Of the JPEGs.', 1, 100, _FLAGS)
flags.DEFINE_integer('num_shards', None, 'One keeps a core busy. Default: size / 1250, at least 16.', 1, 99_999, _FLAGS)
flags.DEFINE_bool('verify', False, 'Only check what was written.', _FLAGS)


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    if {'--help', '-help', '-h'} & set(argv[1:]):
        print(f'{__doc__}\n{_FLAGS.get_help()}')
        return 0
    try:
        if stray := _FLAGS(argv)[1:]:
            raise flags.Error(f'unexpected argument {stray[0]!r}: every setting is a flag')
        _run(Path(_FLAGS.target_dir).expanduser(), _FLAGS.split)
    except (flags.Error, DataError, OSError, tf.errors.OpError) as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    return 0


def _run(target: Path, split: str) -> None:
    data_dir = _FLAGS.data_dir if '://' in _FLAGS.data_dir else os.path.realpath(os.path.expanduser(_FLAGS.data_dir))
    source = open_source(_FLAGS.name, data_dir, split)
    size, count = len(source), _FLAGS.num_shards or min(len(source), max(16, -(-len(source) // 1250)))
    if count > size or '://' in _FLAGS.target_dir:
        raise DataError(f'--num_shards={count} must be at most {size}, the number of examples, and '
                        f'--target_dir={_FLAGS.target_dir} a local directory')
    shards = {target / f'{split}-{k:05d}-of-{count:05d}': np.arange(k * size // count, (k + 1) * size // count)
              for k in range(count)}
    if not _FLAGS.verify:
        target.mkdir(parents=True, exist_ok=True)
    with open(target / f'{split}.reencode.json', 'r' if _FLAGS.verify else 'a+') as file:
        _claim(file, {key: _FLAGS[key].value for key in ('name', 'split', 'short_side', 'quality')}
               | {'data_dir': data_dir, 'num_examples': size, 'num_shards': count})
        missing = {path: indices for path, indices in shards.items() if not (_FLAGS.verify or path.exists())}
        _in_threads(lambda *shard: _write(source, *shard), missing)
        with contextlib.suppress(OSError):  # of shards that may only be read
            os.utime(next(iter(shards)))  # makes the reader index anew, where it would rely on checksums it saw before
        try:
            written = open_source('tfrecord', str(target), split)
        except DataError as error:
            raise DataError(f'{error}; delete what is damaged and run without --verify') from error
        if written[0][1] != source[0][1]:  # the reader tells from the labels alone where they begin
            raise DataError(f'{target}: no example has class 0, and labels would be taken to count from 1; re-encode a '
                            "'train' split that has one into the same directory, then run this again")
        _in_threads(lambda *shard: _check(source, written, *shard), shards)


def _claim(file: io.TextIOBase, parameters: dict[str, str | int]) -> None:
    """Locks the file while it is open. Raises DataError if another process has it, or shards have other parameters."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if _FLAGS.verify else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        file.seek(0)
        was = json.loads(file.read() or '{}')
    except (BlockingIOError, ValueError) as error:
        raise DataError(f'{file.name} is damaged, or another process is at work on this split: {error}') from error
    changed = [f'{key} {was.get(key)!r}, not {now!r}' for key, now in parameters.items() if was.get(key) != now]
    if changed and (was or any(Path(file.name).parent.glob(f'{_FLAGS.split}-{5 * "[0-9]"}-of-*'))):
        raise DataError(f'{file.name}: the shards there have {", ".join(changed)}; take those, or another --target_dir')
    if not was:
        print(json.dumps(parameters), file=file, flush=True)


def _in_threads(work: Callable[[Path, np.ndarray], Counter], shards: dict[Path, np.ndarray]) -> None:
    """work(path, indices) of each shard, one a core at a time, with the sums of what it counts in a line on stderr."""
    began, total, sums = time.monotonic(), sum(map(len, shards.values())), Counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for counts in pool.map(work, shards, shards.values()):
            sums.update(counts)
            secs, done = time.monotonic() - began, sums['images']
            print(*(f'{number:,} {what},' for what, number in sums.items()), f'of {total:,} images: '
                  f'{done / secs:,.0f} a second, {secs / 60 * (total / done - 1):.0f} min left',
                  end='  \r' if sys.stderr.isatty() and done < total else '\n', file=sys.stderr, flush=True)


def _write(source: Source, path: Path, indices: np.ndarray) -> Counter:
    partial, counts = path.with_name(f'{path.name}.partial'), Counter()
    with tf.io.TFRecordWriter(str(partial)) as writer:
        for part in np.split(indices, range(16, len(indices), 16)):  # neighbours come in one read
            for original, label in zip(*source.read(part)):
                image = _shrink(original)
                features = {'image/encoded': tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
                            'image/class/label': tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))}
                writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
                counts.update({'images': 1, 'kept': image == original, 'bytes': len(image), 'before': len(original)})
    flush(partial)  # on the disk before it has its name
    partial.rename(path)
    flush(path.parent)
    return counts


def _shrink(original: bytes) -> bytes:
    try:
        image = Image.fromarray(decode(original))
        if min(image.size) > _FLAGS.short_side:
            image = image.resize([_FLAGS.short_side * side // min(image.size) for side in image.size], Image.BICUBIC)
        elif original.startswith(b'\xff\xd8\xff'):
            return original
        buffer = io.BytesIO()
        image.save(buffer, 'JPEG', quality=_FLAGS.quality, subsampling='4:2:0')
    except (ValueError, OSError):  # of the decoder; of the encoder, which takes no more than 65,500 pixels in a row
        return original
    return buffer.getvalue()


def _check(source: Source, written: Source, path: Path, indices: np.ndarray) -> Counter:
    counts, has = Counter(), lambda k: k < len(written) and path.name in written.where(k)
    for part in np.split(indices, range(16, len(indices), 16)):
        for i, original, label in zip(part.tolist(), *source.read(part)):
            is_there = has(i) and has(i + 1) == (i < indices[-1]) and not written.problem(i)
            image, label_written = written[i] if is_there else (b'', -1)
            try:
                short_side = min(decode(image).shape[:2])
            except ValueError:
                short_side = np.inf
            if label_written != label or short_side > _FLAGS.short_side and image != original:
                raise DataError(f'{path} does not hold example {i} as it should: delete it and run without --verify')
            counts.update({'images': 1, 'that cannot be decoded': short_side == np.inf})
    return counts


if __name__ == '__main__':
    sys.exit(main(sys.argv))
