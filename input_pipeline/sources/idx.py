"""Pixels in memory as a source of PNGs, since sources are of encoded images: MNIST-like sets' idx files, and arrays."""
import gzip
import os
import zlib

import cv2
import numpy as np

from input_pipeline.sources.source import DataError, Source

_PREFIXES = {'train': 'train', 'test': 't10k'}


def open_idx(data_dir: str, split: str) -> Source:
    """Opens {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz in DATA_DIR; splits are `train` and `test`.

    Raises DataError for an unknown split, a missing or damaged file, or images and labels that do not belong together.
    """
    if split not in _PREFIXES:
        raise DataError(f'idx has no split {split!r}; it has: train, test')
    images_path = os.path.join(data_dir, f'{_PREFIXES[split]}-images-idx3-ubyte.gz')
    labels_path = os.path.join(data_dir, f'{_PREFIXES[split]}-labels-idx1-ubyte.gz')
    for path in (images_path, labels_path):
        if not os.path.exists(path):
            raise DataError(f'no file {path}; for Fashion-MNIST install the Debian package dataset-fashion-mnist and '
                            'take --data_dir=/usr/share/datasets/fashion-mnist, or let TFDS download it: '
                            "data.name = 'tfds:fashion_mnist'")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f'{images_path} holds {len(images)} images but {labels_path} {len(labels)} labels')
    return array_source(images, labels, name=f'idx {images_path}')


def read_idx(path: str, num_dimensions: int) -> np.ndarray:
    """uint8 array of `num_dimensions` dimensions in a gzipped idx file. Raises DataError if it is none."""
    try:
        with gzip.open(path) as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f'{path} cannot be read: {error}') from error
    header = 4 + 4 * num_dimensions
    if len(data) < header or data[:4] != bytes([0, 0, 8, num_dimensions]):
        raise DataError(f'{path} is no idx file of unsigned bytes with {num_dimensions} dimensions')
    shape = tuple(np.frombuffer(data, '>u4', num_dimensions, 4).tolist())
    if len(data) - header != np.prod(shape, dtype=np.int64):
        raise DataError(f'{path} holds {len(data) - header} bytes for shape {shape}: it was cut off; get it again')
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def array_source(images: np.ndarray, labels: np.ndarray, num_classes: int | None = None, *,
                 name: str = 'array') -> Source:
    """Source over images in memory, uint8 [N, H, W, 3] or [N, H, W], with labels, integers [N] in 0..num_classes-1.

    num_classes is by default the largest label and one. Raises DataError for wrong shapes, types or labels.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[3:] not in ((), (3,)) or not images.size:
        raise DataError(f'{name}: images are {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 3] or [N, H, W]')
    if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu':
        raise DataError(f'{name}: labels are {labels.dtype} {list(labels.shape)}; wanted integers [{len(images)}]')
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f'{name}: labels are {labels.min()}..{labels.max()}; wanted 0..{num_classes - 1}')
    labels = labels.astype(np.int32)
    return Source(name, len(images), [str(i) for i in range(num_classes)], lambda indices: (
        [encode_png(images[i]) for i in indices], labels[indices]), lambda i: f'{name} (image {i})')


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] or [H, W] -> a PNG that stores the pixels uncompressed."""
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    stored = [cv2.IMWRITE_PNG_COMPRESSION, 0, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    return cv2.imencode('.png', pixels, stored)[1].tobytes()
