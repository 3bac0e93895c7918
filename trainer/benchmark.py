"""--mode=benchmark: images a second of the input alone, of the step alone, and of both. Leaves no trace."""
import logging
import time
from collections.abc import Callable, Iterator

import tensorflow as tf

import input_pipeline
from trainer.evaluate import open_train_batches
from trainer.plan import make_plan
from trainer.recipe import Data, Train
from trainer.stalls import Stalls
from trainer.state import build_model_and_state
from trainer.step import make_normalize, make_sum_over_workers, make_train_loop
from trainer.strategy import find_worker

MIN_SECS = 10  # of each measurement


def benchmark(settings: Train, data: Data, *, strategy: tf.distribute.Strategy, train_source: input_pipeline.Source,
              train_dataset: Callable[..., tf.data.Dataset]) -> dict[str, float]:
    """Measures a run from its first step on, with fresh weights, one after the other for MIN_SECS or more each.

    Returns 'input_images_per_sec' (batches up to the device, no step), 'step_images_per_sec' (the first batch again and
    again), 'images_per_sec' (both), the latter's 'data_wait_fraction', and the tags of `Stalls.metrics`.
    """
    rows, plan = settings.global_batch_size, make_plan(settings, len(train_source), False)
    schedule = settings.schedule(num_steps=plan.num_steps, steps_per_epoch=plan.steps_per_epoch, global_batch_size=rows)
    model, state, update = build_model_and_state(settings, strategy, train_source.num_classes)
    train_loop = make_train_loop(strategy, model, state, settings, normalize=make_normalize(
        data.pixel_mean, data.pixel_std), update_fn=update, schedule=schedule)
    sum_over_workers = make_sum_over_workers(strategy)
    stalls = Stalls(sum_over_workers, *find_worker(strategy))

    @tf.function
    def input_loop(batches: Iterator, num_steps: tf.Tensor) -> dict[str, tf.Tensor]:
        for _ in tf.range(num_steps):
            next(batches)
        return {'data_wait_secs': tf.zeros([], tf.float64)}

    def measure(loop: Callable, change: Callable[[tf.data.Dataset], tf.data.Dataset]) -> tuple[float, float]:
        """(images a second, part of the time that steps waited for data)."""
        batches = open_train_batches(strategy, settings, state, train_source, lambda *args, **kwargs: change(
            train_dataset(*args, on_times=stalls.spent, **kwargs)))
        loop(batches, tf.constant(1))  # traced and compiled
        stalls.spent_on_steps(0.0, 0.0, False)
        count, num_steps, waited, started = 0, 1, 0.0, time.perf_counter()
        # All workers go on as long as any wants to.
        while sum_over_workers(int((secs := time.perf_counter() - started) < MIN_SECS)):
            waited += float(loop(batches, tf.constant(num_steps))['data_wait_secs'])
            count, num_steps = count + num_steps, min(2 * num_steps, settings.steps_per_loop)
        stalls.spent_on_steps(secs, waited, True)
        return count * rows / secs, waited / secs

    results = {'input_images_per_sec': measure(input_loop, lambda dataset: dataset)[0],
               'step_images_per_sec': measure(train_loop, lambda dataset: dataset.take(1).cache().repeat())[0]}
    stalls.metrics()  # of neither of them anything is said
    results['images_per_sec'], results['data_wait_fraction'] = measure(train_loop, lambda dataset: dataset)
    logging.info('input alone %.0f, step alone %.0f, both %.0f images a second', *list(results.values())[:3])
    return results | stalls.metrics()
