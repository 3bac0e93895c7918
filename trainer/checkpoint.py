"""Checkpoints: directories that are whole or not there.

A checkpoint is written aside, flushed, checksummed and committed by one rename; then the pointer file that TensorFlow's
own loaders read is replaced the same way. Reading trusts checksums, never the pointer.
"""
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.recipe import ConfigError

NAME = 'ckpt-{:08d}'  # by step
_NAME = re.compile(r'ckpt-(\d{8,})')


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint directory."""
    return int(_NAME.fullmatch(path.name)[1])


def list_checkpoints(directory: Path) -> list[Path]:
    """Committed checkpoint directories, oldest step first."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted((p for p in paths if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def save(directory: Path, step: int, values: Mapping[str, Any], meta: Mapping[str, Any], *, keep: int,
         keep_every: int | None = None, periodic: int | None = None) -> Path:
    """Commits `directory`/ckpt-<step>, points at it, and removes those that are not to be kept.

    `values` are variables or arrays by the names they are stored under; `meta`, JSON-able, gets the checksums too. The
    newest `keep` are kept, those whose step is a multiple of `keep_every`, and the newest at a multiple of `periodic`.
    Raises OSError, tf.errors.OpError: it could not be written; what was written is removed.
    """
    final = directory / NAME.format(step)
    aside = directory / f'.writing-{final.name}'
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while saving
        aside.mkdir()
        _write(aside, step, values, meta)
        if final.exists():  # the same step again after a fall back: what is there was damaged or is equal
            shutil.rmtree(final)
        aside.rename(final)
        flush(directory)
        pointer = directory / '.writing-pointer'
        pointer.write_text(f'model_checkpoint_path: "{final.name}/state"\n')
        flush(pointer)
        pointer.rename(directory / 'checkpoint')
        flush(directory)
    except (OSError, tf.errors.OpError):
        shutil.rmtree(aside, ignore_errors=True)  # or half of it would keep a full disk full
        raise
    # Those of later steps first: they are damaged, or of a time before the run was rolled back.
    others = sorted((p for p in list_checkpoints(directory) if p != final), key=lambda p: step_of(p) < step)
    kept = [p for p in [*others, final] if periodic and step_of(p) % periodic == 0][-1:]
    kept += [p for p in others if keep_every and step_of(p) % keep_every == 0]
    outdated = [p for p in others[:max(0, len(others) - keep + 1)] if p not in kept]
    for old in [*outdated, *directory.glob('.writing-ckpt-*')]:
        shutil.rmtree(old, ignore_errors=True)  # the new one is saved all the same; tried again after the next save
    return final


def _write(aside: Path, step: int, values: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    tf.raw_ops.SaveV2(prefix=str(aside / 'state'), tensor_names=list(values), shape_and_slices=[''] * len(values),
                      tensors=[tf.convert_to_tensor(v) for v in values.values()])
    meta = {**meta, 'step': step, 'sha256': {path.name: _sha256(path) for path in sorted(aside.iterdir())}}
    meta['sha256']['meta.json'] = _sha256_of_meta(meta)
    (aside / 'meta.json').write_text(json.dumps(meta, indent=1))
    for path in [*aside.iterdir(), aside]:
        flush(path)


def remove_after(directory: Path, step: int) -> None:
    """Removes the checkpoints of later steps."""
    for path in [p for p in list_checkpoints(directory) if step_of(p) > step]:
        shutil.rmtree(path)


def latest_valid(directory: Path) -> Path | None:
    """The newest checkpoint that is whole, None if there is none; damaged ones are passed over with a warning.

    Raises ConfigError: all of them are damaged, and to start anew would be to lose the run in silence.
    """
    paths = list_checkpoints(directory)
    for path in reversed(paths):
        if not (damage := find_damage(path)):
            return path
        logging.warning('checkpoint %s is damaged (%s): passed over', path, damage)
    if paths:
        raise ConfigError(f'all {len(paths)} checkpoints in {directory} are damaged: restore one from a copy, or take '
                          'another --workdir to start anew')


def find_damage(path: Path) -> str:
    """What is wrong with the files of a checkpoint, or ''."""
    try:
        checksums = (meta := read_meta(path))['sha256']
    except (OSError, ValueError, KeyError) as error:
        return f'meta.json cannot be read: {error}'
    for name, checksum in checksums.items():
        if not (path / name).is_file():
            return f'{name} is missing'
        if (_sha256_of_meta(meta) if name == 'meta.json' else _sha256(path / name)) != checksum:
            return f'{name} does not have the checksum it was written with'
    return '' if checksums else 'meta.json names no file'


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of a checkpoint."""
    return json.loads((path / 'meta.json').read_text())


def load(path: Path, variables: Mapping[str, tf.Variable]) -> dict[str, np.ndarray]:
    """Reads the tensors of these variables. Raises ConfigError: names or shapes differ from the checkpoint's."""
    tensors, left_over, difference = load_fitting(path, variables, ('',))
    missing = {name for name in variables.keys() - tensors.keys() if not name.startswith('guard/')}  # begins anew
    if missing or any(n.startswith(('params/', 'batch_stats/', 'slots/')) for n in left_over):
        raise ConfigError(f'checkpoint {path} is of another model: {difference}')
    return tensors


def load_fitting(path: Path, variables: Mapping[str, tf.Variable],
                 prefixes: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[str], str]:
    """Of names with one of `prefixes`: tensors that fit `variables`, names left over, and in words what misfits."""
    reader = tf.train.load_checkpoint(str(path / 'state'))
    stored = {name: shape for name, shape in reader.get_variable_to_shape_map().items() if name.startswith(prefixes)}
    misshapen = sorted(name for name in set(variables) & set(stored) if variables[name].shape.as_list() != stored[name])
    missing, left_over = sorted(set(variables) - set(stored)), sorted(set(stored) - set(variables))
    return ({name: reader.get_tensor(name) for name in variables if name not in {*missing, *misshapen}}, left_over,
            f'missing {_some(missing)}; left over {_some(left_over)}; other shape {_some(misshapen)}')


def _some(names: list[str]) -> str:
    return 'none' if not names else ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _sha256_of_meta(meta: Mapping[str, Any]) -> str:
    """Of everything in meta.json but this number itself."""
    others = {name: checksum for name, checksum in meta['sha256'].items() if name != 'meta.json'}
    return hashlib.sha256(json.dumps({**meta, 'sha256': others}, sort_keys=True).encode()).hexdigest()


def flush(path: Path) -> None:
    """Puts a file, or what a directory lists, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
