"""A folder of image files, one folder a class, as a source."""
import logging
import os
from pathlib import Path

import numpy as np

from input_pipeline.sources.source import DataError, Source

_SUFFIXES = '.jpeg', '.jpg', '.png', '.gif', '.bmp'


def open_folder(data_dir: str, split: str) -> Source:
    """Opens DATA_DIR/<split>/<class>/*.{JPEG,jpg,jpeg,png,gif,bmp}; classes and files sorted by name.

    The classes are those of `train`, or of all splits where there is none of that name, so that a split that lacks one
    does not shift the others. Raises DataError for no such split, a class without images or unknown to `train`.
    """
    split_dir = os.path.join(data_dir, split)
    wanted = f'wanted {data_dir}/<split>/<class>/*.JPEG (or .jpg .jpeg .png .gif .bmp)'
    if not os.path.isdir(split_dir):
        raise DataError(f'no directory {split_dir}; {wanted}; splits found there: '
                        f'{", ".join(_directories(data_dir)) or "none"}')
    found, train_dir = _directories(split_dir), os.path.join(data_dir, 'train')
    if not found:
        raise DataError(f'{split_dir} holds no class directories; {wanted}')
    splits = ['train'] if os.path.isdir(train_dir) else _directories(data_dir)
    class_names = sorted({name for other in splits for name in _directories(os.path.join(data_dir, other))})
    if unknown := sorted(set(found) - set(class_names)):
        raise DataError(f'{split_dir}: class {unknown[0]!r} is not among the {len(class_names)} classes of {train_dir}')
    files, labels, num_others = [], [], 0
    for name in found:
        entries = [entry for entry in os.scandir(os.path.join(split_dir, name)) if not entry.name.startswith('.')]
        images = sorted((entry for entry in entries if entry.name.lower().endswith(_SUFFIXES)), key=lambda e: e.name)
        num_others += len(entries) - len(images)
        if not images:
            raise DataError(f'{os.path.join(split_dir, name)} holds no image; {wanted}')
        if broken := [image.path for image in images if not image.is_file()]:
            raise DataError(f'{broken[0]} is no file, or a link to one that is not there')
        files += [os.fsencode(os.path.join(name, image.name)) for image in images]
        labels += [class_names.index(name)] * len(images)
    if num_others:
        logging.warning('%s: left out %d entries; %s', split_dir, num_others, wanted)
    files, labels = np.array(files), np.array(labels, np.int32)  # a million Python strings take far more memory

    def where(i):
        return os.path.join(split_dir, os.fsdecode(files[i]))

    def read(indices):
        return [Path(where(i)).read_bytes() for i in indices], labels[indices]

    return Source(f'folder {split_dir}', len(files), class_names, read, where)


def _directories(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith('.'))
