"""Training from the first step to the last: the table of contents of the system."""
import contextlib
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import tensorflow as tf

import input_pipeline
from trainer import checkpoint
from trainer.bad_examples import BadExamples
from trainer.evaluate import make_evaluate, open_train_batches
from trainer.goodput import Goodput, reported_seconds
from trainer.plan import make_plan
from trainer.preemption import StoppedEarly, Watchdog
from trainer.recipe import Data, Train
from trainer.resume import describe_environment, restore_latest, roll_back, start_from
from trainer.saver import Saver, keep_best
from trainer.stalls import Stalls
from trainer.state import build_model_and_state
from trainer.step import make_normalize, make_sum_over_workers, make_train_loop
from trainer.strategy import find_worker, take_turns
from trainer.telemetry import Telemetry, eval_line, progress_line, read_json_lines, train_metrics


def train(settings: Train, data: Data, *, strategy: tf.distribute.Strategy, train_source: input_pipeline.Source,
          eval_source: input_pipeline.Source | None, train_dataset: Callable[..., tf.data.Dataset],
          eval_dataset: Callable[..., tf.data.Dataset], workdir: Path, fingerprint: Mapping[str, str],
          write_config: Callable[[Path], None], should_stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Trains, evaluates as configured, resumes whatever `workdir` holds, and returns the last tags that were reported.

    Without eval_source nothing is evaluated. train_dataset and eval_dataset are input_pipeline's with what the recipe
    binds. Once everything is checked, `workdir` is made if absent, and write_config(workdir) called. A resumed run must
    have its checkpoint's `fingerprint`. After a loop of steps all save and stop if any worker's should_stop() says so.
    Raises ConfigError: the recipe does not fit data, devices or checkpoint; too many bad examples; numbers go wrong
    again and again. StoppedEarly: should_stop() said so, all is saved. SaveError: see train.save_retry_secs.
    """
    started, goodput = time.perf_counter(), Goodput()
    rows, plan = settings.global_batch_size, make_plan(settings, len(train_source), eval_source is not None)

    # ---- What is trained, and from where on ----
    rate = settings.schedule(num_steps=plan.num_steps, steps_per_epoch=plan.steps_per_epoch, global_batch_size=rows)
    num_classes = max(source.num_classes for source in (train_source, eval_source) if source is not None)
    model, state, update = build_model_and_state(settings, strategy, num_classes)
    meta = {'fingerprint': {**fingerprint, 'number of training examples': str(len(train_source))},
            **describe_environment(strategy)}
    sum_over_workers = make_sum_over_workers(strategy)
    is_writer = strategy.extended.should_checkpoint  # one worker writes for all
    resumed = restore_latest(workdir / 'checkpoints', strategy, state, meta, settings.allow_config_change,
                             sum_over_workers)
    if not resumed and settings.initial_weights is not None:
        start_from(settings.initial_weights, model, state)
    step = int(state.step.numpy())
    reports = [report for _, report in read_json_lines(workdir / 'metrics.jsonl', 'step')]
    goodput.resume(resumed.get('seconds', {}), max(map(reported_seconds, reports), default=0.0))
    reports = [report for report in reports if report['step'] <= step]
    # A run that was stopped on its way through an evaluation has saved without its results.
    is_evaluated = any(report['step'] == step and 'eval/top1' in report for report in reports)
    is_eval_due = sum_over_workers(int(is_writer and step > 0 and plan.is_eval_step(step) and not is_evaluated)) > 0
    final = {tag: value for report in reports for tag, value in report.items() if '/' in tag}
    if step >= plan.last_step and not is_eval_due:
        logging.info('finished: %s holds step %d of %d; nothing to do', workdir, step, plan.last_step)
        return final

    # ---- What runs on the devices ----
    normalize = make_normalize(data.pixel_mean, data.pixel_std)
    train_loop = make_train_loop(strategy, model, state, settings, normalize=normalize, update_fn=update, schedule=rate)
    bad, eval_bad = (source and BadExamples(
        workdir / 'bad_examples.jsonl', settings.bad_example_budget, functools.partial(
            take_turns, strategy, sum_over_workers), source) for source in (train_source, eval_source))
    stalls = Stalls(sum_over_workers, *find_worker(strategy))
    open_batches = functools.partial(open_train_batches, strategy, settings, state, train_source,
                                     functools.partial(train_dataset, on_bad=bad.found, on_times=stalls.spent))
    batches = open_batches()
    evaluators = [] if eval_source is None else [make_evaluate(
        strategy, model, settings, normalize, state, weights, source=eval_source, eval_dataset=eval_dataset,
        bad=eval_bad, open_batches=open_batches) for weights in ['raw'] + ['ema'] * (settings.ema_decay is not None)]

    # ---- The run ----
    if is_writer:
        write_config(workdir)
    telemetry = Telemetry(workdir if is_writer else None, step)
    saver = Saver(workdir / 'checkpoints' if is_writer else None, state.variables(), settings)
    reported, is_traced, loop_steps = Counter(resumed.get('pending', {})), False, 1
    logging.info('training steps %d to %d of %d, %.1f steps an epoch', step, plan.last_step, plan.num_steps,
                 plan.steps_per_epoch)

    def must_stop() -> bool:  # asked by all workers at the same points, after loops of batches, and answered alike
        watchdog.heard()
        return sum_over_workers(int(should_stop())) > 0

    def num_that_fit(secs: float, count: int) -> int:  # into a loop: a signal is obeyed after it, by all workers
        secs_of_one = sum_over_workers(round(1e6 * secs)) / 1e6 / find_worker(strategy)[1] / count
        return max(1, min(settings.steps_per_loop, int(settings.grace_secs / 2 / secs_of_one)))

    def split(num_batches: int) -> Iterator[int]:
        size = 1
        while num_batches:
            if must_stop():
                raise StoppedEarly('amid an evaluation')
            started = time.perf_counter()
            yield (count := min(size, num_batches))
            size, num_batches = num_that_fit(time.perf_counter() - started, count), num_batches - count

    def evaluate_and_keep_best() -> bool:
        """Whether it came to its end."""
        started, results = time.perf_counter(), {}
        with goodput.spend('evaluating'):
            try:
                for evaluate in evaluators:
                    results |= evaluate(split)
            except StoppedEarly:
                return False
        final.update(results)
        if is_writer:  # before the report, without which a run that is killed in between evaluates again
            with goodput.spend('saving'):
                keep_best(workdir / 'best', step, results, state.variables(), meta)
        stalls.spent_on_steps(0.0, 0.0, is_traced=False)  # forget what precise batch norm has read
        telemetry.report(step, results)
        telemetry.progress(eval_line(step, results, time.perf_counter() - started), is_lasting=True)
        return True

    def save() -> None:
        with goodput.spend('saving'):
            saver.save(step, meta | {'pending': dict(reported), 'seconds': dict(goodput.seconds)})

    with contextlib.closing(telemetry), Watchdog(strategy, settings.step_timeout_secs) as watchdog:
        goodput.seconds['restoring'] += time.perf_counter() - started
        if must_stop() or is_eval_due and not evaluate_and_keep_best():
            raise StoppedEarly(f'stopped at step {step} of {plan.last_step}, with nothing new to save')
        if state.guard and not resumed:
            save()  # what to go back to if numbers go wrong at once
        while step < plan.last_step:
            until = plan.next_stop(step, loop_steps)
            started = time.perf_counter()
            sums = tf.nest.map_structure(float, train_loop(batches, tf.constant(until - step)))  # here the host waits
            secs = time.perf_counter() - started
            goodput.spent_on_steps(secs, sums['data_wait_secs'], is_traced)
            stalls.spent_on_steps(secs, sums['data_wait_secs'], is_traced)
            reported.update(sums | {'steps': until - step, 'secs': secs})
            loop_steps = num_that_fit(secs, until - step)  # the first loop is of one, which is traced and compiled
            if round(sums['seen']) < (until - step) * rows:
                bad.settle(int(state.position.numpy()))
            step, is_traced = until, True

            if settings.rollback_after and state.guard['skips_in_a_row'].numpy() >= settings.rollback_after:
                saver.finish(settings.save_retry_secs, sum_over_workers)
                before = roll_back(workdir / 'checkpoints', state, settings, step, is_writer, sum_over_workers)
                step, reported = before['step'], Counter(before['pending'])
                goodput.resume(before['seconds'], sum(goodput.seconds.values()))
                sum_over_workers(0)  # all have read them
                if is_writer:
                    checkpoint.remove_after(workdir / 'checkpoints', step)
                telemetry.go_back(step)
                telemetry.report(step + 1, before['report'])
                final.update(before['report'])
                batches = open_batches()
                continue
            if step in plan.resizes:
                batches, is_traced, loop_steps = open_batches(), False, 1  # the loop is traced again, once a size

            metrics = train_metrics(reported, float(rate(tf.constant(step - 1))))
            telemetry.progress(progress_line(step=step, num_steps=plan.last_step, metrics=metrics, eta_secs=(
                plan.last_step - step) * reported['secs'] / reported['steps']), is_lasting=plan.is_report_step(step))
            if plan.is_report_step(step):
                if reported['skipped'] == reported['steps']:
                    logging.warning('all steps since the last report were skipped: see train.rollback_after')
                metrics |= goodput.metrics() | bad.metrics() | stalls.metrics()
                if state.loss_scale:
                    metrics['train/loss_scale'] = float(state.loss_scale['loss_scale'].numpy())
                telemetry.report(step, metrics)
                final.update(metrics)
                reported = Counter()
            # Saved after the evaluation, so that a run that is killed in it evaluates again.
            is_stopping = must_stop()
            is_evaluated = not plan.is_eval_step(step) or not is_stopping and evaluate_and_keep_best()
            is_stopping = is_stopping or not is_evaluated or plan.is_eval_step(step) and must_stop()
            is_ending = is_stopping or step == plan.last_step
            if is_ending or saver.is_due() or step % settings.checkpoint_every_steps == 0:
                save()
            if is_ending:
                saver.finish(settings.grace_secs if is_stopping else settings.save_retry_secs, sum_over_workers)
                telemetry.progress(str(goodput), is_lasting=True)
            if is_stopping and not (step == plan.last_step and is_evaluated):
                raise StoppedEarly(f'stopped at step {step} of {plan.last_step}, and saved')
    return final
