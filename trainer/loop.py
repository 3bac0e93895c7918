"""Training from the first step to the last: the table of contents of the system.

Everything is validated before the workdir is touched; the host is touched once per train.steps_per_loop.
"""
import contextlib
import functools
import json
import logging
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

import input_pipeline
from trainer import checkpoint
from trainer.evaluate import make_evaluate, open_train_batches
from trainer.preemption import Watchdog
from trainer.recipe import ConfigError, Data, Train
from trainer.state import TrainState, build_model_and_state
from trainer.step import make_normalize, make_train_loop, use_jit, value_of_first_worker
from trainer.strategy import describe_worker, is_chief
from trainer.telemetry import Telemetry, progress_line


def train(settings: Train, data: Data, *, strategy: tf.distribute.Strategy, train_source: input_pipeline.Source,
          eval_source: input_pipeline.Source | None, train_dataset: Callable[..., tf.data.Dataset],
          eval_dataset: Callable[..., tf.data.Dataset], workdir: Path, fingerprint: Mapping[str, str],
          write_config: Callable[[Path], None]) -> dict[str, float]:
    """Trains, evaluates as configured, and resumes whatever `workdir` holds.

    Args:
        settings, data: the recipe.
        strategy: where it runs.
        train_source, eval_source: the examples; without the latter nothing is evaluated.
        train_dataset, eval_dataset: input_pipeline's, with what the recipe binds.
        workdir: see the README; made if absent, after everything has been checked.
        fingerprint: what a resumed run must have in common with the checkpoint.
        write_config: called with the workdir once training is about to start.

    Returns:
        The last reported tags of training and evaluation.

    Raises:
        ConfigError: the recipe does not fit the data, the devices or the checkpoint; an image that cannot be decoded.
    """
    # ---- How long ----
    num_examples, rows = len(train_source), settings.global_batch_size
    num_steps = int(settings.epochs * num_examples / rows + 1e-9)
    last_step = min(num_steps, settings.max_steps or num_steps)
    if not num_steps:
        raise ConfigError(f'train.epochs is {settings.epochs}: with {num_examples} examples that is less than one '
                          f'batch of train.global_batch_size = {rows}')
    steps_per_epoch = num_examples / rows

    # ---- What is trained, and from where on ----
    schedule = settings.schedule(num_steps=num_steps, steps_per_epoch=steps_per_epoch, global_batch_size=rows)
    num_classes = max(source.num_classes for source in (train_source, eval_source) if source is not None)
    model, state, update = build_model_and_state(settings, strategy, num_classes)
    meta = {'fingerprint': {**fingerprint, 'number of training examples': str(num_examples)}, **_environment(strategy)}
    _restore_latest(workdir / 'checkpoints', strategy, state, meta, settings.allow_config_change)
    step = int(state.step.numpy())
    if step >= last_step:
        logging.info('finished: %s holds step %d of %d; nothing to do', workdir, step, last_step)
        return _last_metrics(workdir / 'metrics.jsonl')

    # ---- What runs on the devices ----
    jit = use_jit(settings.jit, strategy, settings.sync_batch_norm)
    normalize = make_normalize(data.pixel_mean, data.pixel_std)
    train_loop = make_train_loop(
        strategy, model, state, normalize=normalize, update_fn=update, schedule=schedule, global_batch_size=rows,
        seed=settings.seed, accumulate=settings.accumulate, label_smoothing=settings.label_smoothing,
        clip_norm=settings.clip_norm, adaptive_clip=settings.adaptive_clip, ema_decay=settings.ema_decay,
        sync_batch_norm=settings.sync_batch_norm, all_reduce_dtype=settings.all_reduce_dtype, jit=jit)
    resizes = {round(epoch * steps_per_epoch) for epoch, _ in settings.image_sizes or ()}

    open_batches = functools.partial(open_train_batches, strategy, settings, state, train_source, train_dataset)
    batches = open_batches()
    evaluators = {} if eval_source is None else {
        kind: make_evaluate(strategy, model, state, weights, source=eval_source, eval_dataset=eval_dataset,
                            global_batch_size=rows, normalize=normalize, flip=settings.eval_flip, jit=jit,
                            precise_batches=settings.eval_precise_batch_norm, open_batches=open_batches)
        for kind, weights in [('eval', 'raw')] + [('eval_ema', 'ema')] * (settings.ema_decay is not None)}

    # ---- The run ----
    is_writer = is_chief(strategy)  # all workers compute the same; one writes it down
    if is_writer:
        write_config(workdir)
    telemetry = Telemetry(workdir if is_writer else None, step)
    save = functools.partial(checkpoint.save, variables=state.variables()) if is_writer else lambda *_, **__: None
    eval_every_steps = settings.eval_every_epochs * steps_per_epoch
    saved_at, reported, final = time.monotonic(), _Interval(), {}
    logging.info('training steps %d to %d of %d, %.1f steps an epoch', step, last_step, num_steps, steps_per_epoch)
    with contextlib.closing(telemetry), Watchdog(strategy, settings.step_timeout_secs) as watchdog:
        while step < last_step:
            next_eval = _next_multiple(step, eval_every_steps) if evaluators else last_step
            until = min(step + settings.steps_per_loop, _next_multiple(step, settings.log_every_steps),
                        _next_multiple(step, settings.checkpoint_every_steps), next_eval, last_step,
                        *(first for first in resizes if first > step))
            started = time.perf_counter()
            sums = train_loop(batches, tf.constant(until - step))
            sums = {name: float(value) for name, value in sums.items()}  # the one place where the host waits
            watchdog.heard()
            reported.add(until - step, time.perf_counter() - started, sums)
            if round(sums['seen']) < (until - step) * rows:
                raise _undecodable(train_source, settings.seed, end=int(state.position.numpy()),
                                   count=(until - step) * rows)
            step = until
            if step in resizes:
                batches = open_batches()  # the loop is traced again, once a size

            is_last, is_eval = step == last_step, evaluators and step == next_eval or step == last_step
            metrics = reported.metrics(float(schedule(tf.constant(step - 1))))
            if state.loss_scale:
                metrics['train/loss_scale'] = float(state.loss_scale['loss_scale'].numpy())
            line = progress_line(step=step, num_steps=last_step, metrics=metrics,
                                 eta_secs=(last_step - step) * rows / metrics['train/images_per_sec'])
            if step % settings.log_every_steps == 0 or is_eval:
                telemetry.report(step, metrics)
                telemetry.progress(line, is_lasting=True)
                final.update(metrics)
                reported = _Interval()
            else:
                telemetry.progress(line, is_lasting=False)
            if is_eval and evaluators:
                started = time.perf_counter()
                results = {f'{kind}/{name}': value for kind, evaluate in evaluators.items()
                           for name, value in evaluate().items()}
                watchdog.heard()
                final.update(results)
                telemetry.report(step, results)
                telemetry.progress(_eval_line(step, results, time.perf_counter() - started), is_lasting=True)
                if is_writer:
                    _keep_best(workdir / 'best', step, results, save, meta)
            # After the evaluation, so that a run that is killed in it evaluates again.
            is_due = time.monotonic() - saved_at >= (settings.checkpoint_every_secs or float('inf'))
            if is_last or is_due or step % settings.checkpoint_every_steps == 0:
                save(workdir / 'checkpoints', step, meta=meta, keep=settings.keep_checkpoints)
                saved_at = time.monotonic()
    return final


class _Interval:
    """Sums over the steps since the last report."""

    def __init__(self):
        self.num_steps, self.secs, self.sums = 0, 0.0, {}

    def add(self, num_steps: int, secs: float, sums: Mapping[str, float]) -> None:
        self.num_steps += num_steps
        self.secs += secs
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in sums.items()}

    def metrics(self, learning_rate: float) -> dict[str, float]:
        examples = self.sums['examples'] or math.nan  # none if every step was skipped
        return {'train/loss': self.sums['loss'] / examples, 'train/top1': self.sums['top1'] / examples,
                'train/learning_rate': learning_rate, 'train/images_per_sec': self.sums['seen'] / self.secs,
                'train/data_wait_fraction': min(1.0, self.sums['data_wait_secs'] / self.secs),
                'train/grad_norm': self.sums['grad_norm'] / max(self.num_steps - self.sums['skipped'], 1),
                'train/skipped_steps': self.sums['skipped']}


def _next_multiple(step: int, every: float) -> int:
    """The first step after `step` at which another whole number of `every` steps is done; `every` need not be whole."""
    count = int(step / every + 1e-9) + 1
    return max(step + 1, -int(-(count * every - 1e-6) // 1))


def _restore_latest(directory: Path, strategy: tf.distribute.Strategy, state: TrainState, now: Mapping[str, Any],
                    allow_change: bool) -> None:
    path = checkpoint.latest_valid(directory)
    found = checkpoint.step_of(path) if path else -1
    first_found = value_of_first_worker(strategy, found)
    if found != first_found:
        worker = describe_worker(strategy, strategy.cluster_resolver.task_id)
        seen, first_seen = (f'step {step}' if step >= 0 else 'no checkpoint' for step in (found, first_found))
        raise ConfigError(f'{worker} finds {seen} in {directory}, worker 0 {first_seen}: --workdir must name a '
                          'directory that all workers share')
    if path is None:
        return
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


def _environment(strategy: tf.distribute.Strategy) -> dict[str, Any]:
    """What bits depend on, apart from the recipe."""
    cpuinfo = Path('/proc/cpuinfo')
    cpu = re.search(r'model name\s*: (.*)', cpuinfo.read_text() if cpuinfo.exists() else '')
    return {'tensorflow': tf.__version__, 'cpu': cpu[1] if cpu else platform.machine(),
            'num_cpus': len(os.sched_getaffinity(0)), 'num_replicas': strategy.num_replicas_in_sync,
            'threads': [tf.config.threading.get_inter_op_parallelism_threads(),
                        tf.config.threading.get_intra_op_parallelism_threads()]}


def _keep_best(directory: Path, step: int, results: Mapping[str, float], save: Callable,
               meta: Mapping[str, Any]) -> None:
    """Keeps one checkpoint, that of the best top-1; averaged weights count where they are kept."""
    tag = 'eval_ema/top1' if 'eval_ema/top1' in results else 'eval/top1'
    best = checkpoint.latest_valid(directory)
    if best is None or results[tag] > checkpoint.read_meta(best)['metrics'][tag]:
        save(directory, step, meta={**meta, 'metrics': dict(results)}, keep=1)


def _eval_line(step: int, results: Mapping[str, float], secs: float) -> str:
    kinds = sorted({tag.split('/')[0] for tag in results})
    parts = [f'{kind} top-1 {100 * results[f"{kind}/top1"]:.2f} %  top-5 {100 * results[f"{kind}/top5"]:.2f} %  '
             f'loss {results[f"{kind}/loss"]:.4f}' for kind in kinds]
    return f'step {step}  {"  ".join(parts)}  ({results["eval/examples"]} examples, {secs:.1f} s)'


def _undecodable(source: input_pipeline.Source, seed: int, end: int, count: int) -> ConfigError:
    """Names the first example that was masked among the `count` positions before `end`."""
    n = len(source)
    indices = (input_pipeline.order.permutation(seed, p // n, n)[p % n] for p in range(end - count, end))
    found = input_pipeline.first_undecodable(source, indices)
    if found is None:
        return ConfigError(f'train_dataset.crop fails on images of {source.name} that can be decoded')
    index, reason = found
    return ConfigError(f'{source.where(index)} (example {index}) is no image that can be decoded: {reason}; repair it '
                       'or take it out, and run the same command again')


def _last_metrics(path: Path) -> dict[str, float]:
    metrics = {}
    for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else []:
        metrics.update(json.loads(line))
    return {tag: value for tag, value in metrics.items() if '/' in tag}
