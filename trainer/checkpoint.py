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

_NAME = re.compile(r'ckpt-(\d{8,})')


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint directory."""
    return int(_NAME.fullmatch(path.name)[1])


def list_checkpoints(directory: Path) -> list[Path]:
    """Committed checkpoint directories, oldest step first."""
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def save(directory: Path, step: int, variables: Mapping[str, tf.Variable], meta: Mapping[str, Any], *,
         keep: int) -> Path:
    """Commits `directory`/ckpt-<step>, points at it, and removes all but the `keep` newest.

    `variables` are stored under the names they have there; to `meta`, JSON-able, the checksums of the files are added.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f'ckpt-{step:08d}'
    aside = directory / f'.writing-{final.name}'
    if aside.exists():  # of a run that was killed while saving
        shutil.rmtree(aside)
    aside.mkdir()
    tf.raw_ops.SaveV2(prefix=str(aside / 'state'), tensor_names=list(variables),
                      shape_and_slices=[''] * len(variables), tensors=[v.read_value() for v in variables.values()])
    files = sorted(p.name for p in aside.iterdir())
    meta = {**meta, 'step': step, 'sha256': {name: _sha256(aside / name) for name in files}}
    meta['sha256']['meta.json'] = _sha256_of_meta(meta)
    (aside / 'meta.json').write_text(json.dumps(meta, indent=1))
    for name in [*files, 'meta.json']:
        _flush(aside / name)
    _flush(aside)
    if final.exists():  # the same step again after a fall back: what is there was damaged or is equal
        shutil.rmtree(final)
    aside.rename(final)
    _flush(directory)
    _point_at(directory, final)
    others = [p for p in list_checkpoints(directory) if p != final]
    for old in [*others[:max(0, len(others) - keep + 1)], *directory.glob('.writing-ckpt-*')]:
        shutil.rmtree(old)
    return final


def latest_valid(directory: Path) -> Path | None:
    """The newest checkpoint whose files have their checksums; others are passed over with a warning that names them.

    None if there are no checkpoints.

    Raises:
        ConfigError: there are, and all of them are damaged: to start anew would be to lose the run in silence.
    """
    paths = list_checkpoints(directory)
    for path in reversed(paths):
        damage = find_damage(path)
        if not damage:
            return path
        logging.warning('checkpoint %s is damaged (%s): passed over', path, damage)
    if paths:
        raise ConfigError(f'all {len(paths)} checkpoints in {directory} are damaged: restore one from a copy, or take '
                          'another --workdir to start anew')
    return None


def find_damage(path: Path) -> str:
    """What is wrong with the files of a checkpoint, or ''."""
    try:
        meta = read_meta(path)
        checksums = meta['sha256']
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
    """Reads the tensors of these variables.

    Raises:
        ConfigError: names or shapes differ from the checkpoint's.
    """
    reader = tf.train.load_checkpoint(str(path / 'state'))
    stored = reader.get_variable_to_shape_map()
    missing = sorted(set(variables) - set(stored))
    misshapen = sorted(name for name in set(variables) & set(stored) if variables[name].shape.as_list() != stored[name])
    if missing or misshapen:
        left_over = sorted(set(stored) - set(variables))
        raise ConfigError(f'checkpoint {path} is of another model: missing {_some(missing)}; left over '
                          f'{_some(left_over)}; other shape {_some(misshapen)}')
    return {name: reader.get_tensor(name) for name in variables}


def _some(names: list[str]) -> str:
    return 'none' if not names else ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _point_at(directory: Path, final: Path) -> None:
    """The pointer file in the form of tf.train.latest_checkpoint."""
    aside = directory / '.writing-pointer'
    aside.write_text(f'model_checkpoint_path: "{final.name}/state"\n')
    _flush(aside)
    aside.rename(directory / 'checkpoint')
    _flush(directory)


def _sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _sha256_of_meta(meta: Mapping[str, Any]) -> str:
    """Of everything in meta.json but this number itself."""
    others = {name: checksum for name, checksum in meta['sha256'].items() if name != 'meta.json'}
    return hashlib.sha256(json.dumps({**meta, 'sha256': others}, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
