"""TFRecord shards with an index as a source: finding the shards of a split, and what bare labels mean."""
import logging
import os
import re
from collections.abc import Sequence

import numpy as np

from input_pipeline.sources.record_index import RecordIndex, load_record_index
from input_pipeline.sources.source import DataError, Source

_log = logging.getLogger(__name__)
IMAGE_KEY, LABEL_KEY = 'image/encoded', 'image/class/label'


def open_tfrecord(data_dir: str, split: str) -> Source:
    """Opens DATA_DIR/<split>-?????-of-?????, records with `image/encoded` and `image/class/label`.

    Labels may count from 0 or from 1 (as in ImageNet shards that keep 0 for "background"): they count from 1 if the
    smallest label of the `train` split is 1, from 0 if it is 0. A split that lies beside `train` follows `train`, since
    a small split need not hold every class; otherwise the split itself decides. The largest label gives the number of
    classes.

    Raises:
      DataError: shards are missing or damaged, or the labels fit neither rule.
    """
    paths = find_shards(data_dir, split, suffix='')
    index = load_record_index(paths, split, IMAGE_KEY, LABEL_KEY)
    rule_split, rule_index = split, index
    if split != 'train' and 'train' in list_splits(data_dir, suffix=''):
        rule_split = 'train'
        rule_index = load_record_index(find_shards(data_dir, 'train', suffix=''), 'train', IMAGE_KEY, LABEL_KEY)
    what = f'{split} of {data_dir}'
    first, num_classes = label_rule(rule_index.label, f'{rule_split} of {data_dir}')
    check_labels(index.label - first, num_classes, what, f'{rule_split} has {first}..{first + num_classes - 1}')
    return make_indexed_source(f'tfrecord {what}', index, index.label - first, [str(i) for i in range(num_classes)])


def make_indexed_source(name: str, index: RecordIndex, labels: np.ndarray, class_names: Sequence[str]) -> Source:
    """Source that reads through an index; `labels` count from 0."""
    labels = labels.astype(np.int32)

    def read(indices):
        return [_read_span(index.paths[shard], offset, length) for shard, offset, length in zip(
            index.shard[indices].tolist(), index.offset[indices].tolist(), index.length[indices].tolist())
        ], labels[indices]

    return Source(name, len(index), class_names, read, index.where)


def _read_span(path: str, offset: int, length: int) -> bytes:
    # Not memory-mapped: a page that has to come from the disk would stop every Python thread, and a thousand shards
    # would stay open. It costs 15 us of the 1,800 that an image of 119 KB takes in all.
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, length, offset)
    finally:
        os.close(file)


def list_splits(data_dir: str, suffix: str) -> list[str]:
    """Names of the splits that have any shard in DATA_DIR."""
    pattern = re.compile(r'(.+)-\d{5}-of-\d{5}' + re.escape(suffix))
    return sorted({match[1] for match in map(pattern.fullmatch, os.listdir(data_dir)) if match})


def find_shards(data_dir: str, split: str, suffix: str) -> list[str]:
    """Paths of the shards DATA_DIR/<split>-?????-of-?????<suffix> in order.

    Raises:
      DataError: none exists, one is missing, or two sets are mixed.
    """
    pattern = re.compile(re.escape(split) + r'-(\d{5})-of-(\d{5})' + re.escape(suffix))
    found = sorted(match[0] for match in map(pattern.fullmatch, os.listdir(data_dir)) if match)
    if not found:
        others = ', '.join(list_splits(data_dir, suffix)) or 'none'
        raise DataError(f'no shards {split}-?????-of-?????{suffix} in {data_dir}; splits found there: {others}')
    counts = {pattern.fullmatch(name)[2] for name in found}
    if len(counts) > 1:
        raise DataError(f'{data_dir} mixes shards of {split} of several sets: -of-{", -of-".join(sorted(counts))}; '
                        'keep one')
    wanted = [f'{split}-{i:05d}-of-{counts.copy().pop()}{suffix}' for i in range(int(min(counts)))]
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise DataError(f'{data_dir} lacks {len(missing)} of the {len(wanted)} shards of {split}, such as {missing[0]}')
    return [os.path.join(data_dir, name) for name in found]


def label_rule(labels: np.ndarray, what: str) -> tuple[int, int]:
    """The label of class 0 and the number of classes, from all labels of the split that decides.

    Raises:
      DataError: there is no label, or the smallest is neither 0 nor 1.
    """
    if not len(labels):
        raise DataError(f'{what}: the shards hold no record')
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest not in (0, 1):
        raise DataError(f'{what}: labels are {smallest}..{largest}; the smallest must be 0 or 1')
    num_classes = largest - smallest + 1
    _log.info('%s: labels %d..%d count from %d, %d classes', what, smallest, largest, smallest, num_classes)
    return smallest, num_classes


def check_labels(labels: np.ndarray, num_classes: int, what: str, right: str) -> None:
    """Raises DataError unless all of `labels` (counted from 0) are in 0..num_classes-1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(f'{what}: {len(wrong)} of {len(labels)} labels are out of range (example {wrong[0]} is class '
                        f'{labels[wrong[0]]} counted from 0); {right}')
