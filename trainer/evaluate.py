"""Evaluation: each example of a split counted exactly once, with raw or averaged weights."""
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import keras
import tensorflow as tf

import input_pipeline
from trainer import checkpoint
from trainer.bad_examples import BadExamples
from trainer.recipe import ConfigError, Data, Evaluate, Train
from trainer.state import TrainState, build_model_and_state
from trainer.step import distribute, make_estimate_loop, make_eval_loop, make_normalize, make_sum_over_workers
from trainer.strategy import find_worker


def open_train_batches(strategy: tf.distribute.Strategy, settings: Train, state: TrainState,
                       source: input_pipeline.Source, train_dataset: Callable[..., tf.data.Dataset]) -> Iterator:
    """The training batches from the position of `state` on, as large as they are at its step."""
    rows = settings.global_batch_size
    return iter(distribute(strategy, functools.partial(
        train_dataset, source, global_batch_size=rows, seed=settings.seed, start_position=int(state.position.numpy()),
        **settings.image_size_at(int(state.step.numpy()), len(source) / rows))))


def make_evaluate(strategy: tf.distribute.Strategy, model: keras.Model, settings: Train, normalize: Callable,
                  state: TrainState, weights: str, *, source: input_pipeline.Source, bad: BadExamples,
                  eval_dataset: Callable[..., tf.data.Dataset],
                  open_batches: Callable[[], Iterator]) -> Callable[[Callable], dict[str, float]]:
    """Makes evaluate(split) -> 'eval/loss', mean in nats, 'eval/top1', 'eval/top5', fractions, 'eval/examples'.

    split(num_batches) gives the size of each loop of batches before it begins; what it raises is passed on. Evaluated
    are the 'raw' or 'ema' `weights` of the time of the call ('eval_ema/...'), on the examples of `source`; those masked
    are noted in `bad`. Statistics of settings.eval_precise_batch_norm batches are of the first of `open_batches()`.
    """
    params, batch_stats = state.weights(weights)
    if settings.eval_precise_batch_norm:
        with strategy.scope():
            batch_stats = {path: tf.Variable(value, trainable=False) for path, value in batch_stats.items()}
        estimate_loop = make_estimate_loop(strategy, model, settings, normalize, params, batch_stats)
    eval_loop = make_eval_loop(strategy, model, settings, normalize, params, batch_stats)
    rows = settings.global_batch_size
    batches = distribute(strategy, functools.partial(eval_dataset, source, global_batch_size=rows, on_bad=bad.found))
    # Traced now: what fails, fails before training, and no change of the source, which tracing reads, spoils it later.
    eval_loop(iter(batches), [0])

    def evaluate(split: Callable[[int], Iterable[int]]) -> dict[str, float]:
        if count := settings.eval_precise_batch_norm:
            estimate_loop(open_batches(), count, split(count))
        sums = eval_loop(iter(batches), split(math.ceil(len(source) / rows)))
        if round(sums['rows']) != len(source):
            raise RuntimeError(f'{sums["rows"]:.0f} rows were evaluated, there are {len(source)} examples')
        if round(sums['examples']) < len(source):  # the others are bad
            bad.settle()
        kind = {'raw': 'eval', 'ema': 'eval_ema'}[weights]
        return {f'{kind}/{name}': sums[name] / (sums['examples'] or math.nan) for name in ('loss', 'top1', 'top5')} | {
            f'{kind}/examples': round(sums['examples'])}

    return evaluate


def evaluate_checkpoint(settings: Train, data: Data, which: Evaluate, *, strategy: tf.distribute.Strategy,
                        eval_source: input_pipeline.Source, train_source: input_pipeline.Source | None,
                        train_dataset: Callable[..., tf.data.Dataset], eval_dataset: Callable[..., tf.data.Dataset],
                        workdir: Path) -> dict[str, float]:
    """--mode=eval: the tags of `make_evaluate`, 'step' and 'checkpoint'. Changes nothing in the workdir.

    Raises ConfigError: no such checkpoint, a damaged one, one of another model, or one without the weights asked for.
    """
    path = Path(which.checkpoint)
    if which.checkpoint in ('latest', 'best'):
        directory = workdir / ('checkpoints' if which.checkpoint == 'latest' else 'best')
        if (path := checkpoint.latest_valid(directory)) is None:
            raise ConfigError(f'no whole checkpoint in {directory}: train first, or name the run with --workdir')
    elif damage := checkpoint.find_damage(path):
        raise ConfigError(f"evaluate.checkpoint is {which.checkpoint!r}: {damage}; it must be 'latest', 'best' or a "
                          'directory ckpt-<step>')
    if which.weights == 'ema' and settings.ema_decay is None:
        raise ConfigError("evaluate.weights is 'ema', but train.ema_decay is None: the run keeps no average")
    model, state, _ = build_model_and_state(settings, strategy, eval_source.num_classes)
    state.restore(checkpoint.load(path, state.variables()))
    if make_sum_over_workers(strategy)(step := int(state.step.numpy())) != step * find_worker(strategy)[1]:
        raise ConfigError(f'evaluate.checkpoint is {which.checkpoint!r}, which workers differ in: name a directory')
    evaluate = make_evaluate(
        strategy, model, settings, make_normalize(data.pixel_mean, data.pixel_std), state, which.weights,
        source=eval_source, eval_dataset=eval_dataset,
        bad=BadExamples(None, settings.bad_example_budget, lambda write: write(), eval_source),
        open_batches=lambda: open_train_batches(strategy, settings, state, train_source, train_dataset))
    return evaluate(lambda num_batches: [num_batches]) | {'step': step, 'checkpoint': str(path)}
