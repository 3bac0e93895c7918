"""What a run resumes from: the newest whole checkpoint in its workdir, if the recipe is still the one that made it.

Apart from loop.py, whose length it would double, and from checkpoint.py, which knows files and no recipe.
"""
import logging
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from trainer import checkpoint
from trainer.recipe import ConfigError
from trainer.state import TrainState
from trainer.step import make_sum_over_workers
from trainer.strategy import describe_worker, is_chief


def restore_latest(directory: Path, strategy: tf.distribute.Strategy, state: TrainState, now: Mapping[str, Any],
                   allow_change: bool) -> dict[str, Any]:
    """Restores `state` from the newest whole checkpoint in `directory`, if there is one, and returns its meta, or {}.

    `now` has the 'fingerprint', which must be the checkpoint's unless `allow_change`, and what else bits depend on.

    Raises:
        ConfigError: another recipe or model, nothing but damaged checkpoints, or workers that see different ones.
    """
    path = checkpoint.latest_valid(directory)
    found = checkpoint.step_of(path) if path else -1
    first_found = make_sum_over_workers(strategy)(found if is_chief(strategy) else 0)
    if found != first_found:
        worker = describe_worker(strategy, strategy.cluster_resolver.task_id)
        seen, first_seen = (f'step {step}' if step >= 0 else 'no checkpoint' for step in (found, first_found))
        raise ConfigError(f'{worker} finds {seen} in {directory}, worker 0 {first_seen}: --workdir must name a '
                          'directory that all workers share')
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
        if key != 'fingerprint' and then.get(key) != value:
            logging.warning('%s was %s, is %s: resume is exact in data, not in bits', key, then.get(key), value)
    return then


def describe_environment(strategy: tf.distribute.Strategy) -> dict[str, Any]:
    """What bits depend on, apart from the recipe."""
    cpuinfo = Path('/proc/cpuinfo')
    cpu = re.search(r'model name\s*: (.*)', cpuinfo.read_text() if cpuinfo.exists() else '')
    return {'tensorflow': tf.__version__, 'cpu': cpu[1] if cpu else platform.machine(),
            'num_cpus': len(os.sched_getaffinity(0)), 'num_replicas': strategy.num_replicas_in_sync,
            'threads': [tf.config.threading.get_inter_op_parallelism_threads(),
                        tf.config.threading.get_intra_op_parallelism_threads()]}
