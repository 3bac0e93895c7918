"""Evaluation: each example of a split counted exactly once, with raw or averaged weights."""
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import tensorflow as tf

import input_pipeline
from trainer import checkpoint
from trainer.recipe import ConfigError, Data, Evaluate, Train
from trainer.state import TrainState, build_model_and_state
from trainer.step import distribute, make_estimate_loop, make_eval_loop, make_normalize, use_jit


def open_train_batches(strategy: tf.distribute.Strategy, settings: Train, state: TrainState,
                       source: input_pipeline.Source, train_dataset: Callable[..., tf.data.Dataset]) -> Iterator:
    """The training batches from the position of `state` on, as large as they are at its step."""
    rows = settings.global_batch_size
    return iter(distribute(strategy, functools.partial(
        train_dataset, source, global_batch_size=rows, seed=settings.seed, start_position=int(state.position.numpy()),
        **settings.image_size_at(int(state.step.numpy()), len(source) / rows))))


def make_evaluate(strategy: tf.distribute.Strategy, model: keras.Model, state: TrainState, weights: str, *,
                  source: input_pipeline.Source, eval_dataset: Callable[..., tf.data.Dataset],
                  global_batch_size: int, normalize: Callable[[tf.Tensor], tf.Tensor], flip: bool,
                  jit: bool, precise_batches: int,
                  open_batches: Callable[[], Iterator],
                  batches_per_loop: int) -> Callable[[Callable[[], bool]], dict[str, float] | None]:
    """Makes evaluate(must_stop) -> {'loss', 'top1', 'top5', 'examples'}: mean loss in nats, fractions, and a count.

    None if must_stop(), which is asked after each loop of batches, says so before the last one.

    Args:
        strategy, model, state: what to evaluate; the values of the variables are those at the time of the call.
        weights: 'raw' or 'ema'.
        source: the examples.
        eval_dataset: input_pipeline's, with what the recipe binds.
        global_batch_size, normalize, jit: as in training.
        flip: see `make_eval_loop`.
        precise_batches: how many batches of `open_batches()` batch statistics are taken from, for the evaluation alone;
            0: the moving statistics are.
        batches_per_loop: how many are evaluated between two touches of the host.
    """
    params, batch_stats = state.weights(weights)
    if precise_batches:
        with strategy.scope():
            batch_stats = {path: tf.Variable(value, trainable=False) for path, value in batch_stats.items()}
        estimate_loop = make_estimate_loop(strategy, model, params, batch_stats, normalize=normalize, jit=jit)
    eval_loop = make_eval_loop(strategy, model, params, batch_stats, normalize=normalize, flip=flip, jit=jit)
    # Built here, so that arguments it refuses are known before anything is trained.
    batches = distribute(strategy, functools.partial(eval_dataset, source, global_batch_size=global_batch_size))
    num_examples = len(source)
    num_batches = -(-num_examples // global_batch_size)
    # Traced now: what fails, fails before training, and not even a change of the source under a running trainer, which
    # tracing reads, can spoil an evaluation hours later.
    eval_loop(iter(batches), tf.constant(0))

    def evaluate(must_stop: Callable[[], bool]) -> dict[str, float] | None:
        if precise_batches:
            estimate_loop(open_batches(), tf.constant(precise_batches))
        iterator, sums = iter(batches), Counter()
        for first in range(0, num_batches, batches_per_loop):
            if must_stop():
                return None
            part = eval_loop(iterator, tf.constant(min(batches_per_loop, num_batches - first)))
            sums.update({name: float(value) for name, value in part.items()})
        if round(sums['examples']) != num_examples:
            raise _undecodable(source, num_examples - round(sums['examples']))
        return {'loss': sums['loss'] / num_examples, 'top1': sums['top1'] / num_examples,
                'top5': sums['top5'] / num_examples, 'examples': num_examples}

    return evaluate


def _undecodable(source: input_pipeline.Source, count: int) -> ConfigError:
    found = input_pipeline.first_undecodable(source, range(len(source)))
    index, reason = found or (0, 'eval_dataset fails on it')
    return ConfigError(f'{count} of the {len(source)} evaluation examples cannot be decoded, the first is '
                       f'{source.where(index)} (example {index}): {reason}')


def evaluate_checkpoint(settings: Train, data: Data, which: Evaluate, *, strategy: tf.distribute.Strategy,
                        eval_source: input_pipeline.Source, train_source: input_pipeline.Source | None,
                        train_dataset: Callable[..., tf.data.Dataset], eval_dataset: Callable[..., tf.data.Dataset],
                        workdir: Path) -> dict[str, float]:
    """--mode=eval: 'eval/loss', 'eval/top1', 'eval/top5', 'eval/examples' ('eval_ema/...' for averaged weights), 'step'
    and 'checkpoint'. Changes nothing in the workdir.

    Raises:
        ConfigError: no such checkpoint, a damaged one, one of another model, or one without the weights asked for.
    """
    path = _find_checkpoint(workdir, which.checkpoint)
    if which.weights == 'ema' and settings.ema_decay is None:
        raise ConfigError("evaluate.weights is 'ema', but train.ema_decay is None: the run keeps no average")
    model, state, _ = build_model_and_state(settings, strategy, eval_source.num_classes)
    state.restore(checkpoint.load(path, state.variables()))
    evaluate = make_evaluate(
        strategy, model, state, which.weights, source=eval_source, eval_dataset=eval_dataset,
        global_batch_size=settings.global_batch_size, normalize=make_normalize(data.pixel_mean, data.pixel_std),
        flip=settings.eval_flip, jit=use_jit(settings.jit, strategy, settings.sync_batch_norm),
        precise_batches=settings.eval_precise_batch_norm,
        open_batches=lambda: open_train_batches(strategy, settings, state, train_source, train_dataset),
        batches_per_loop=settings.steps_per_loop)
    kind = 'eval' if which.weights == 'raw' else 'eval_ema'
    return {f'{kind}/{name}': value for name, value in evaluate(lambda: False).items()} | {
        'step': int(state.step.numpy()), 'checkpoint': str(path)}


def _find_checkpoint(workdir: Path, which: str) -> Path:
    if which in ('latest', 'best'):
        directory = workdir / ('checkpoints' if which == 'latest' else 'best')
        path = checkpoint.latest_valid(directory)
        if path is None:
            raise ConfigError(f'no whole checkpoint in {directory}: train first, or name the run with --workdir')
        return path
    path = Path(which)
    damage = checkpoint.find_damage(path)
    if damage:
        raise ConfigError(f"evaluate.checkpoint is {which!r}: {damage}; it must be 'latest', 'best' or a directory "
                          'ckpt-<step>')
    return path
