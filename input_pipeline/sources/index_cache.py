"""The cache of what was learnt by reading a set of shards once."""
import hashlib
import json
import logging
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

_log = logging.getLogger(__name__)
_FORMAT = 1


def cached_arrays(paths: Sequence[str], name: str, key: str,
                  build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """`build()`, or its result from an earlier call on the same shards.

    The cache is `<name>-<hash of the shards' names>.ghostnet-index.npz` beside the shards or, when that directory
    cannot be written, in `$XDG_CACHE_HOME/ghostnet` (`~/.cache/ghostnet`). It no longer holds when `key` or the name,
    size or time of any shard changed.
    """
    stats = [(os.path.basename(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, map(os.stat, paths))]
    fingerprint = json.dumps([_FORMAT, key, stats])
    cache_paths = _cache_paths(paths, name)
    for cache_path in cache_paths:
        arrays = _load(cache_path, fingerprint)
        if arrays is not None:
            return arrays
    _log.info('indexing %s, shards: %d (once)', name, len(paths))
    start = time.monotonic()
    arrays = build()
    cached_at = _save(cache_paths, fingerprint, arrays)
    _log.info('indexed %s in %.1f s, cached in %s', name, time.monotonic() - start,
                 cached_at or 'no file (neither place can be written): the next start indexes again')
    return arrays


def _cache_paths(paths: Sequence[str], name: str) -> tuple[str, str]:
    beside = os.path.dirname(os.path.abspath(paths[0]))
    cache_dir = os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'ghostnet')
    # Of the names, since two parts of one split (train[:90%], train[90%:]) are two sets of shards in one directory.
    name += '-' + _short_hash(*map(os.path.basename, paths))
    return (os.path.join(beside, f'{name}.ghostnet-index.npz'),
            os.path.join(cache_dir, f'{name}-{_short_hash(beside)}.ghostnet-index.npz'))


def _short_hash(*texts: str) -> str:
    return hashlib.sha256('\n'.join(texts).encode()).hexdigest()[:12]


def _load(path: str, fingerprint: str) -> dict[str, np.ndarray] | None:
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if str(arrays.pop('fingerprint')) == fingerprint:
            return arrays
        _log.info('%s is out of date: the shards changed', path)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        _log.warning('%s cannot be read (%s): indexing again', path, error)
    return None


def _save(cache_paths: Sequence[str], fingerprint: str, arrays: dict[str, np.ndarray]) -> str | None:
    for path in cache_paths:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # Written aside and renamed: another process may be reading or writing the same file.
            with tempfile.TemporaryDirectory(dir=os.path.dirname(path), prefix='.ghostnet-index-') as scratch:
                scratch_path = os.path.join(scratch, 'index.npz')
                np.savez(scratch_path, fingerprint=np.array(fingerprint), **arrays)
                os.replace(scratch_path, path)
            return path
        except OSError as error:
            _log.info('cannot cache the index in %s: %s', path, error)
    return None
