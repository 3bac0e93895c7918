"""The cache of what was learnt by reading a set of shards once."""
import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

_FORMAT = 2


def cached_array(paths: Sequence[str], name: str, key: str, build: Callable[[], np.ndarray]) -> np.ndarray:
    """`build()`, or its result from an earlier call on the same shards.

    The cache is `<name>-<hash of the shards' names>.ghostnet-index.npz` beside the shards or, if none can be written,
    in `$XDG_CACHE_HOME/ghostnet` (`~/.cache/ghostnet`). It is out of date if `key` or a name, size or time changed.
    """
    fingerprint = json.dumps([_FORMAT, key, in_parallel(_name_size_time, paths)])
    beside = os.path.dirname(paths[0] if '://' in paths[0] else os.path.abspath(paths[0]))
    cache_dir = os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'ghostnet')
    # Of the names, since two parts of one split (train[:90%], train[90%:]) are two sets of shards in one directory.
    name += '-' + _short_hash(*map(os.path.basename, paths))
    stems = os.path.join(beside, name), os.path.join(cache_dir, f'{name}-{_short_hash(beside)}')
    cache_paths = [f'{stem}.ghostnet-index.npz' for stem in stems if '://' not in stem]
    for path in filter(os.path.exists, cache_paths):
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file['fingerprint']) == fingerprint:
                    return file['array']
            logging.info('%s is out of date: the shards changed', path)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            logging.warning('%s cannot be read (%s): indexing again', path, error)
    logging.info('indexing %s, shards: %d (once)', name, len(paths))
    array = build()
    for path in cache_paths:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # Written aside and renamed: another process may be reading or writing the same file.
            with tempfile.TemporaryDirectory(dir=os.path.dirname(path), prefix='.ghostnet-index-') as scratch:
                scratch_path = os.path.join(scratch, 'index.npz')
                np.savez(scratch_path, fingerprint=np.array(fingerprint), array=array)
                os.replace(scratch_path, path)
            logging.info('indexed %s, cached in %s', name, path)
            return array
        except OSError as error:
            logging.info('cannot cache the index in %s: %s', path, error)
    logging.info('indexed %s, cached in no file: the next start indexes again', name)
    return array


def in_parallel(function: Callable, paths: Sequence[str]) -> list:
    """`function(path)` of each path; a remote shard answers late, but many do at once."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, paths))


def _name_size_time(path: str) -> tuple[str, int, int]:
    stat = tf.io.gfile.stat(path)
    # The system's time of a local file has nanoseconds, where TensorFlow's has seconds.
    return os.path.basename(path), stat.length, stat.mtime_nsec if '://' in path else os.stat(path).st_mtime_ns


def _short_hash(*texts: str) -> str:
    return hashlib.sha256('\n'.join(texts).encode()).hexdigest()[:12]
