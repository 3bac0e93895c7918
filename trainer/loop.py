"""Training from the first step to the last: the table of contents of the system.

Everything is validated before the workdir is touched; the host is touched once per train.steps_per_loop.
"""
import contextlib
import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

import input_pipeline
from trainer import checkpoint
from trainer.evaluate import make_evaluate, open_train_batches
from trainer.preemption import StoppedEarly, Watchdog
from trainer.recipe import ConfigError, Data, Train
from trainer.resume import describe_environment, restore_latest
from trainer.state import build_model_and_state
from trainer.step import make_normalize, make_sum_over_workers, make_train_loop, use_jit
from trainer.strategy import is_chief
from trainer.telemetry import Telemetry, progress_line, read_reports


def train(settings: Train, data: Data, *, strategy: tf.distribute.Strategy, train_source: input_pipeline.Source,
          eval_source: input_pipeline.Source | None, train_dataset: Callable[..., tf.data.Dataset],
          eval_dataset: Callable[..., tf.data.Dataset], workdir: Path, fingerprint: Mapping[str, str],
          write_config: Callable[[Path], None],
          should_stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Trains, evaluates as configured, and resumes whatever `workdir` holds.

    Args:
        settings, data: the recipe.
        strategy: where it runs.
        train_source, eval_source: the examples; without the latter nothing is evaluated.
        train_dataset, eval_dataset: input_pipeline's, with what the recipe binds.
        workdir: see the README; made if absent, after everything has been checked.
        fingerprint: what a resumed run must have in common with the checkpoint.
        write_config: called with the workdir once training is about to start.
        should_stop: asked after each loop of steps; if any worker's says so, all save and stop.

    Returns:
        The last reported tags of training and evaluation.

    Raises:
        ConfigError: the recipe does not fit the data, the devices or the checkpoint; an image that cannot be decoded.
        StoppedEarly: should_stop said so, and everything is saved.
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
    meta = {'fingerprint': {**fingerprint, 'number of training examples': str(num_examples)},
            **describe_environment(strategy)}
    resumed = restore_latest(workdir / 'checkpoints', strategy, state, meta, settings.allow_config_change)
    step, is_writer = int(state.step.numpy()), is_chief(strategy)  # all workers compute the same; one writes it down
    sum_over_workers = make_sum_over_workers(strategy)
    eval_every_steps = settings.eval_every_epochs * steps_per_epoch

    def is_eval_step(step: int) -> bool:
        return eval_source is not None and step in (_next_multiple(step - 1, eval_every_steps), last_step)

    # A run that was stopped on its way through an evaluation has saved without its results.
    reports = [found for _, found in read_reports(workdir / 'metrics.jsonl') if found['step'] <= step]
    is_evaluated = any(found['step'] == step and 'eval/top1' in found for found in reports)
    is_eval_due = sum_over_workers(int(is_writer and step > 0 and is_eval_step(step) and not is_evaluated)) > 0
    final = {tag: value for found in reports for tag, value in found.items() if '/' in tag}
    if step >= last_step and not is_eval_due:
        logging.info('finished: %s holds step %d of %d; nothing to do', workdir, step, last_step)
        return final

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
                            precise_batches=settings.eval_precise_batch_norm, open_batches=open_batches,
                            batches_per_loop=settings.steps_per_loop)
        for kind, weights in [('eval', 'raw')] + [('eval_ema', 'ema')] * (settings.ema_decay is not None)}

    # ---- The run ----
    if is_writer:
        write_config(workdir)
    telemetry = Telemetry(workdir if is_writer else None, step)
    save = functools.partial(checkpoint.save, variables=state.variables()) if is_writer else lambda *_, **__: None
    saved_at, reported, is_traced = time.monotonic(), Counter(resumed.get('pending', {})), False
    logging.info('training steps %d to %d of %d, %.1f steps an epoch', step, last_step, num_steps, steps_per_epoch)

    def must_stop() -> bool:  # asked by all workers at the same points, and answered alike
        return sum_over_workers(int(should_stop())) > 0

    def evaluate_and_keep_best() -> bool:
        """Whether it came to its end."""
        started, results = time.perf_counter(), {}
        for kind, evaluate in evaluators.items():
            found = evaluate(must_stop)
            if found is None:
                return False
            results |= {f'{kind}/{name}': value for name, value in found.items()}
        watchdog.heard()
        final.update(results)
        if is_writer:  # before the report, without which a run that is killed in between evaluates again
            _keep_best(workdir / 'best', step, results, save, meta)
        telemetry.report(step, results)
        telemetry.progress(_eval_line(step, results, time.perf_counter() - started), is_lasting=True)
        return True

    with contextlib.closing(telemetry), Watchdog(strategy, settings.step_timeout_secs) as watchdog:
        if must_stop() or is_eval_due and not evaluate_and_keep_best():
            raise StoppedEarly(f'stopped at step {step} of {last_step}, with nothing new to save')
        while step < last_step:
            until = min(step + settings.steps_per_loop, _next_multiple(step, settings.log_every_steps),
                        _next_multiple(step, settings.checkpoint_every_steps), last_step,
                        *[_next_multiple(step, eval_every_steps)] * bool(evaluators),
                        *(first for first in resizes if first > step))
            started = time.perf_counter()
            sums = train_loop(batches, tf.constant(until - step))
            sums = {name: float(value) for name, value in sums.items()}  # the one place where the host waits
            watchdog.heard()
            secs = time.perf_counter() - started
            reported.update(sums | {'steps': until - step, 'secs': secs})
            if secs > settings.grace_secs and is_traced:
                logging.warning('a loop of %d steps took %.0f s; a signal to stop is obeyed after it, within '
                                'train.grace_secs = %g: train.steps_per_loop should be at most %d', until - step, secs,
                                settings.grace_secs, max(1, (until - step) * settings.grace_secs / secs))
            is_traced = True
            if round(sums['seen']) < (until - step) * rows:
                raise _undecodable(train_source, settings.seed, end=int(state.position.numpy()),
                                   count=(until - step) * rows)
            step = until
            if step in resizes:
                batches, is_traced = open_batches(), False  # the loop is traced again, once a size

            metrics = _train_metrics(reported, float(schedule(tf.constant(step - 1))))
            if state.loss_scale:
                metrics['train/loss_scale'] = float(state.loss_scale['loss_scale'].numpy())
            is_lasting = step % settings.log_every_steps == 0 or is_eval_step(step) or step == last_step
            telemetry.progress(progress_line(step=step, num_steps=last_step, metrics=metrics, eta_secs=(
                last_step - step) * rows / metrics['train/images_per_sec']), is_lasting=is_lasting)
            if is_lasting:
                telemetry.report(step, metrics)
                final.update(metrics)
                reported = Counter()
            # Saved after the evaluation, so that a run that is killed in it evaluates again.
            is_stopping = must_stop()
            is_evaluated = not is_eval_step(step) or not is_stopping and evaluate_and_keep_best()
            is_stopping = is_stopping or not is_evaluated or is_eval_step(step) and must_stop()
            is_due = time.monotonic() - saved_at >= (settings.checkpoint_every_secs or float('inf'))
            if step == last_step or is_due or is_stopping or step % settings.checkpoint_every_steps == 0:
                save(workdir / 'checkpoints', step, meta=meta | {'pending': reported}, keep=settings.keep_checkpoints)
                saved_at = time.monotonic()
            if is_stopping or step == last_step:
                sum_over_workers(0)  # nobody leaves before it is saved
            if is_stopping and not (step == last_step and is_evaluated):
                raise StoppedEarly(f'stopped at step {step} of {last_step}, and saved')
    return final


def _train_metrics(sums: Mapping[str, float], learning_rate: float) -> dict[str, float]:
    """Of the sums over the steps since the last report."""
    examples = sums['examples'] or math.nan  # none if every step was skipped
    return {'train/loss': sums['loss'] / examples, 'train/top1': sums['top1'] / examples,
            'train/learning_rate': learning_rate, 'train/images_per_sec': sums['seen'] / sums['secs'],
            'train/data_wait_fraction': min(1.0, sums['data_wait_secs'] / sums['secs']),
            'train/grad_norm': sums['grad_norm'] / max(sums['steps'] - sums['skipped'], 1),
            'train/skipped_steps': sums['skipped']}


def _next_multiple(step: int, every: float) -> int:
    """The first step after `step` at which another whole number of `every` steps is done; `every` need not be whole."""
    count = int(step / every + 1e-9) + 1
    return max(step + 1, -int(-(count * every - 1e-6) // 1))


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
