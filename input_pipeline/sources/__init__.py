"""Random access to encoded examples, whatever holds them."""
import difflib
import os

import numpy as np
import tensorflow as tf

from input_pipeline.preprocess import DECODERS
from input_pipeline.sources.arrayrecord import open_arrayrecord
from input_pipeline.sources.folder import open_folder
from input_pipeline.sources.idx import open_idx
from input_pipeline.sources.source import DataError, Source
from input_pipeline.sources.tfrecord import open_tfrecord

_TFDS_REMOTE = 'gs://'  # what TFDS too can read
_OPENERS = {'tfrecord': open_tfrecord, 'arrayrecord': open_arrayrecord, 'folder': open_folder, 'idx': open_idx}


def open_source(name: str, data_dir: str, split: str, *, prepare: bool = False) -> Source:
    """Opens one split of a data set.

    Args:
      name: 'tfds:NAME[/CONFIG][:VERSION]', 'tfrecord', 'arrayrecord', 'folder', 'idx' or 'shapes'.
      data_dir: directory, `shapes` is generated in it; remote ones for 'tfrecord' (all TensorFlow reads), 'tfds:' (gs://).
      split: as the data set names it. prepare: whether TFDS may download and prepare a 'tfds:' set that is not there.

    Raises DataError if nothing usable is there; the message is one line and says what would be right.
    """
    data_dir = os.path.expanduser(data_dir)
    try:
        if '://' in data_dir:
            if name != 'tfrecord' and not (name.startswith('tfds:') and data_dir.startswith(_TFDS_REMOTE)):
                raise DataError(f"data_dir {data_dir} is remote; for {name} give a local directory. 'tfrecord' can be "
                                f"read from there, 'tfds:' from {_TFDS_REMOTE}")
            tf.io.gfile.stat(data_dir)  # says why it cannot be read
        source = _open(name, data_dir, split, prepare)
        if not len(source):
            raise DataError(f'{source.name} holds no example')
        first = list(source.read(np.arange(min(16, len(source))))[0])
    except (OSError, tf.errors.OpError) as error:
        raise DataError(f'{name} in {data_dir} cannot be read: {error}') from error
    # One bad file is masked in training; when all of the first are bad, these are not images at all.
    if not any(encoded.startswith(tuple(DECODERS)) for encoded in first):
        problem = source.problem(0) or f'it is no JPEG, PNG, GIF or BMP image but begins with {first[0][:8]!r}'
        raise DataError(f'{source.where(0)}: {problem}; nor can any of the {len(first) - 1} after it be used')
    return source


def _open(name: str, data_dir: str, split: str, prepare: bool) -> Source:
    if name == 'shapes' or name.startswith('tfds:') and name != 'tfds:':
        from input_pipeline.sources.tfds import open_shapes, open_tfds  # TFDS is slow to import
        if name == 'shapes':
            return open_shapes(data_dir, split)
        return open_tfds(name.removeprefix('tfds:'), data_dir, split, prepare=prepare)
    if name not in _OPENERS:
        names = ['tfds:NAME[/CONFIG][:VERSION]', *_OPENERS, 'shapes']
        near = difflib.get_close_matches(name, names, n=1)
        raise DataError(f'no data source {name!r}; {f"did you mean {near[0]!r}? " if near else ""}'
                        f'There are: {", ".join(names)}')
    if not tf.io.gfile.isdir(data_dir):
        raise DataError(f'data_dir {data_dir} is no directory; {name} data must be there')
    return _OPENERS[name](data_dir, split)
