"""TFRecord shards with an index as a source: finding the shards of a split, and what bare labels mean."""
import logging
import os
import re
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from input_pipeline.sources.index_cache import in_parallel
from input_pipeline.sources.record_index import NO_LABEL, load_record_index, open_shard
from input_pipeline.sources.source import DataError, Source

IMAGE_KEY, LABEL_KEY = 'image/encoded', 'image/class/label'
MAX_BAD_LABELS = 0.1  # of a split; with more the whole set is another one


def open_tfrecord(data_dir: str, split: str) -> Source:
    """Opens DATA_DIR/<split>-?????-of-?????, records with `image/encoded` and `image/class/label`.

    Labels count from 0, or from 1 as in ImageNet shards that keep 0 for "background": from the smallest of the `train`
    split, or of all where none has that name, since a small split need not hold every class. The largest
    gives the number of classes. Raises DataError if shards are missing or damaged, or the labels fit neither rule.
    """
    def load(split):
        paths = find_shards(data_dir, split)
        return paths, load_record_index(paths, split, IMAGE_KEY, LABEL_KEY)

    paths, index = load(split)
    first, class_names = label_rule(index[:, 3], lambda other: load(other)[1][:, 3], data_dir, split)
    return make_indexed_source(f'tfrecord {split} of {data_dir}', paths, index, class_names, first)


def make_indexed_source(name: str, paths: Sequence[str], index: np.ndarray, class_names: Sequence[str],
                        first: int = 0) -> Source:
    """Source over shards with the index that `load_record_index` gave. `first`: class 0's label."""
    is_bad = _are_out_of_range(index[:, 3], len(class_names), first)
    labels = np.where(is_bad, 0, index[:, 3] - first).astype(np.int32)

    def read(indices):
        spans = [(paths[shard], *span) for shard, *span in
                 np.where(is_bad[indices, None], 0, index[indices, :3]).tolist()]
        return _read_remote(spans) if '://' in paths[0] else map(_read_local, spans), labels[indices]

    def problem(i):
        if index[i, 3] == NO_LABEL:
            return 'the checksum of its record is wrong'
        return f'labels are out of range: this is class {index[i, 3] - first} counted from 0' if is_bad[i] else ''

    return Source(name, len(index), class_names, read,
                  lambda i: f'{paths[index[i, 0]]} (image at byte {index[i, 1]})', problem)


def _read_local(span: tuple[str, int, int]) -> bytes:
    # Not memory-mapped: a page that has to come from the disk would stop every Python thread, and a thousand shards
    # would stay open. Nor a file object, which makes twice as many calls of the system, each giving up Python's lock.
    path, offset, length = span
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def _read_remote(spans: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes of each (path, offset, length); one read serves all that are near each other."""
    encoded, runs = [b''] * len(spans), []
    for (path, offset, length), row in sorted((span, row) for row, span in enumerate(spans) if span[2]):
        if not runs or path != runs[-1][0] or offset > runs[-1][2] + (1 << 16):  # which come sooner than another answer
            runs.append([path, offset, offset, []])
        runs[-1][2] = offset + length
        runs[-1][3].append((row, offset, length))

    def fetch(run):
        with open_shard(run[0]) as file:
            file.seek(run[1])
            return file.read(run[2] - run[1])

    for (_, start, _, images), data in zip(runs, in_parallel(fetch, runs)):
        for row, offset, length in images:
            encoded[row] = data[offset - start:offset - start + length]
    return encoded


def _list_shards(data_dir: str, suffix: str) -> dict[str, str]:
    """The split of every shard in DATA_DIR by its file name, in order."""
    pattern = re.compile(r'(.+)-\d{5}-of-\d{5}' + re.escape(suffix))
    return {match[0]: match[1] for match in map(pattern.fullmatch, sorted(tf.io.gfile.listdir(data_dir))) if match}


def find_shards(data_dir: str, split: str, suffix: str = '') -> list[str]:
    """Paths of DATA_DIR/<split>-?????-of-?????<suffix> in order; DataError if any is missing or two sets are mixed."""
    shards = _list_shards(data_dir, suffix)
    found = [name for name in shards if shards[name] == split]
    if not found:
        raise DataError(f'no shards {split}-?????-of-?????{suffix} in {data_dir}; splits found there: '
                        f'{", ".join(sorted(set(shards.values()))) or "none"}')
    counts = sorted({name.removesuffix(suffix)[-5:] for name in found})
    if len(counts) > 1:
        raise DataError(f'{data_dir} mixes shards of {split} of several sets: -of-{", -of-".join(counts)}; keep one')
    wanted = [f'{split}-{i:05d}-of-{counts[0]}{suffix}' for i in range(int(counts[0]))]
    if missing := sorted(set(wanted) - set(found)):
        raise DataError(f'{data_dir} lacks {len(missing)} of the {len(wanted)} shards of {split}, such as {missing[0]}')
    return [os.path.join(data_dir, name) for name in found]


def label_rule(labels: np.ndarray, load_labels: Callable[[str], np.ndarray], data_dir: str, split: str,
               suffix: str = '') -> tuple[int, list[str]]:
    """Class 0's label and the classes' names by the rule of `open_tfrecord`; DataError if it does not fit the split."""
    splits = set(_list_shards(data_dir, suffix).values())
    rule_splits = sorted({'train'} & splits or splits)
    rule_labels = np.concatenate([labels if s == split else load_labels(s) for s in rule_splits])
    rule_labels = rule_labels[rule_labels != NO_LABEL]
    what = f'{", ".join(rule_splits)} of {data_dir}'
    if not len(rule_labels):
        raise DataError(f'{what}: the shards hold no record')
    first, last = int(rule_labels.min()), int(rule_labels.max())
    if first not in (0, 1):
        raise DataError(f'{what}: labels are {first}..{last}; the smallest must be 0 or 1')
    num_classes = last - first + 1
    logging.info('%s: labels %d..%d count from %d, %d classes', what, first, last, first, num_classes)
    check_labels(labels, num_classes, f'{split} of {data_dir}', f'{", ".join(rule_splits)} has {first}..{last}', first)
    return first, [str(i) for i in range(num_classes)]


def _are_out_of_range(labels: np.ndarray, num_classes: int, first: int) -> np.ndarray:
    return (labels < first) | (labels >= first + num_classes)


def check_labels(labels: np.ndarray, num_classes: int, what: str, right: str, first: int = 0) -> None:
    """Raises DataError if so many labels (of records that have one) are out of range that these are no bad examples."""
    wrong = np.flatnonzero(_are_out_of_range(labels, num_classes, first) & (labels != NO_LABEL))
    if len(wrong) > MAX_BAD_LABELS * len(labels):
        raise DataError(f'{what}: {len(wrong)} of {len(labels)} labels are out of range (example {wrong[0]} is class '
                        f'{labels[wrong[0]] - first} counted from 0); {right}')
