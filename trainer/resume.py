"""What a run starts from: weights, the newest whole checkpoint of the same recipe, or one before numbers went wrong."""
import json
import logging
import os
import platform
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from ghostnet import load_pytorch_weights
from trainer import checkpoint
from trainer.recipe import ConfigError, Train
from trainer.state import TrainState
from trainer.strategy import describe_worker


def restore_latest(directory: Path, strategy: tf.distribute.Strategy, state: TrainState, now: Mapping[str, Any],
                   allow_change: bool, sum_over_workers: Callable[[int], int]) -> dict[str, Any]:
    """Restores `state` from the newest whole checkpoint in `directory`, if there is one, and returns its meta, or {}.

    `now` has the 'fingerprint', which must be the checkpoint's unless `allow_change`, and what else bits depend on.
    Raises ConfigError: another recipe or model, all are damaged, or workers differ in checkpoint or recipe.
    """
    path = checkpoint.latest_valid(directory) if (is_writer := strategy.extended.should_checkpoint) else None
    found = checkpoint.step_of(path) if path else -1
    recipe_hash = zlib.crc32(json.dumps(now['fingerprint'], sort_keys=True).encode())
    first_found, first_hash = (sum_over_workers(value if is_writer else 0) for value in (found, recipe_hash))
    if not is_writer and first_found >= 0:
        path = directory / checkpoint.NAME.format(first_found)  # a shared disk may still list an older state
        if damage := checkpoint.find_damage(path):
            raise ConfigError(f'{describe_worker(strategy)} cannot read {path}, which worker 0 takes ({damage}): '
                              '--workdir must name a directory that all workers share')
    if recipe_hash != first_hash:
        raise ConfigError(f'{describe_worker(strategy)} was started with another recipe than worker 0: --gin_file and '
                          '--gin_param must be the same for all')
    if path is None:
        return {}
    then = checkpoint.read_meta(path)
    was, is_ = then['fingerprint'], now['fingerprint']
    differences = [f'{key} was {was.get(key, "not set")}, is {is_.get(key, "not set")}'
                   for key in sorted({*was, *is_}) if was.get(key) != is_.get(key)]
    if differences and not allow_change:
        raise ConfigError(f'{path} was made by another recipe: {"; ".join(differences)}. Take another --workdir, or '
                          'bind train.allow_config_change = True')
    state.restore(checkpoint.load(path, state.variables()))
    logging.info('resuming from %s', path)
    for key, value in now.items():
        if key != 'fingerprint' and then.get(key, value) != value:
            logging.warning('%s was %s, is %s: resume is exact in data, not in bits', key, then[key], value)
    return then


def start_from(path: str, model: keras.Model, state: TrainState) -> None:
    """Gives a new run the weights at `path` and nothing else, and lists what does not fit, as another class count.

    `path` is a checkpoint directory of this trainer's, or a file that `ghostnet.load_pytorch_weights` reads.
    Raises ConfigError: no such file, a damaged checkpoint, or nothing in it that fits.
    """
    if Path(path).is_dir():
        if damage := checkpoint.find_damage(Path(path)):
            raise ConfigError(f'train.initial_weights is {path!r}: {damage}; it must be a directory ckpt-<step>')
        kinds = ('params/', 'batch_stats/')
        weights = {name: variable for name, variable in state.variables().items() if name.startswith(kinds)}
        tensors, _, left_out = checkpoint.load_fitting(Path(path), weights, kinds)
        if not tensors:
            raise ConfigError(f'train.initial_weights is {path!r}, of which nothing fits: {left_out}')
        state.restore(tensors)
        logging.info('%d of %d variables start from %s: %s', len(tensors), len(weights), path, left_out)
    else:
        try:
            unfit = load_pytorch_weights(model, path, strict=False)  # which lists them
            if len(unfit['missing'] + unfit['misshapen']) == len(model.weights):
                raise ValueError(f'nothing in it fits; it holds {", ".join(unfit["left over"][:3])}')
        except (OSError, TypeError, ValueError, ImportError) as error:
            raise ConfigError(f'train.initial_weights is {path!r}: {str(error).splitlines()[0]}') from error
    for key, average in state.ema.items():
        average.assign((state.params | state.batch_stats)[key])


def roll_back(directory: Path, state: TrainState, settings: Train, step: int, is_writer: bool,
              sum_over_workers: Callable[[int], int]) -> dict[str, Any]:
    """After too many skipped steps: back to the newest periodic checkpoint, and on past the examples of those steps.

    The step is the checkpoint's, the position that after the last step that counted among the skipped ones. Without a
    periodic checkpoint another is taken, to which no other run would go back. Returns its meta with the tags to
    'report'; the checkpoint is worker 0's newest. Raises ConfigError: train.max_rollbacks are made.
    """
    rollbacks = int(state.guard['rollbacks'].numpy())
    beyond = int(state.guard['skips_in_a_row'].numpy()) - settings.rollback_after
    position, failed_at = int(state.position.numpy()) - beyond * settings.global_batch_size, step - beyond
    if rollbacks == settings.max_rollbacks:
        raise ConfigError(f'step {failed_at} was the last of train.rollback_after = {settings.rollback_after} in a row '
                          'whose numbers were not finite or leapt, and the run has been rolled back '
                          f'train.max_rollbacks = {rollbacks} times: a lower learning rate or clipping may help')
    whole = [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(directory)
             if is_writer and not checkpoint.find_damage(p)]
    newest = ([s for s in whole if s % settings.checkpoint_every_steps == 0] or whole)[-1] if is_writer else 0
    path = directory / checkpoint.NAME.format(sum_over_workers(newest))  # others may see an older state of it
    state.restore(checkpoint.load(path, state.variables()))
    state.position.assign(position)
    state.guard['rollbacks'].assign(rollbacks + 1)
    state.guard['skips_in_a_row'].assign(0)
    logging.warning('%d steps in a row up to %d were skipped: back to %s, and on from position %d',
                    settings.rollback_after, failed_at, path, position)
    return checkpoint.read_meta(path) | {'report': {
        'train/rollbacks': rollbacks + 1, 'train/rollback_from_step': failed_at, 'train/rollback_position': position}}


def describe_environment(strategy: tf.distribute.Strategy) -> dict[str, Any]:
    """What bits depend on, apart from the recipe."""
    cpuinfo, threads = Path('/proc/cpuinfo'), tf.config.threading
    cpu = re.search(r'model name\s*: (.*)', cpuinfo.read_text() if cpuinfo.exists() else '')
    return {'tensorflow': tf.__version__, 'TF_ENABLE_ONEDNN_OPTS': os.environ.get('TF_ENABLE_ONEDNN_OPTS'),
            'cpu': cpu[1] if cpu else platform.machine(), 'num_cpus': len(os.sched_getaffinity(0)),
            'num_replicas': strategy.num_replicas_in_sync,
            'threads': [threads.get_inter_op_parallelism_threads(), threads.get_intra_op_parallelism_threads()]}
