"""Learning-rate schedules: factories of f(step) -> float32 scalar; step 0 is the first. Pure maths.

All of them share these arguments:
    peak_rate, initial_rate: the largest rate, reached at the end of the warmup; that of step 0, where it starts.
    num_steps: of the whole schedule, warmup included. steps_per_epoch: turns epochs into steps, need not be whole.
    warmup_epochs: length of the warmup, in which the rate rises linearly (Goyal et al. 2017, section 2.2).
    rate_batch_size: the global batch that the rates are given for. All of them are multiplied by global_batch_size, the
        run's, / rate_batch_size, the linear-scaling rule (Goyal et al. 2017, section 2.1). None: taken as they are.

They raise ConfigError: a warmup not shorter than the schedule, an initial rate without a warmup, or a wrong value.
"""
import math
from collections.abc import Callable

import tensorflow as tf

from trainer.recipe import ConfigError, is_number, require

Rate = Callable[[tf.Tensor], tf.Tensor]


def cosine(peak_rate: float, *, num_steps: int, steps_per_epoch: float = 1.0, global_batch_size: int | None = None,
           warmup_epochs: float = 0.0, initial_rate: float = 0.0, final_rate: float = 0.0,
           rate_batch_size: int | None = None) -> Rate:
    """Warmup, then half a cosine from `peak_rate` to `final_rate` (Loshchilov and Hutter, "SGDR", ICLR 2017)."""
    require(is_number(final_rate, 0), 'cosine.final_rate', final_rate, 'a number, at least 0')
    return _after_warmup(
        'cosine', lambda _, progress: final_rate + (peak_rate - final_rate) * 0.5 * (1 + tf.cos(math.pi * progress)),
        num_steps, steps_per_epoch, global_batch_size, peak_rate, warmup_epochs, initial_rate, rate_batch_size)


def linear(peak_rate: float, *, num_steps: int, steps_per_epoch: float = 1.0, global_batch_size: int | None = None,
           warmup_epochs: float = 0.0, initial_rate: float = 0.0, final_rate: float = 0.0,
           rate_batch_size: int | None = None) -> Rate:
    """Warmup, then a straight line from `peak_rate` to `final_rate` (Zhang et al., "ShuffleNet", CVPR 2018, 4)."""
    require(is_number(final_rate, 0), 'linear.final_rate', final_rate, 'a number, at least 0')
    return _after_warmup('linear', lambda _, progress: peak_rate + (final_rate - peak_rate) * progress, num_steps,
                         steps_per_epoch, global_batch_size, peak_rate, warmup_epochs, initial_rate, rate_batch_size)


def exponential(peak_rate: float, *, decay_rate: float, decay_epochs: float, num_steps: int,
                steps_per_epoch: float = 1.0, global_batch_size: int | None = None, warmup_epochs: float = 0.0,
                initial_rate: float = 0.0, rate_batch_size: int | None = None) -> Rate:
    """peak_rate * decay_rate ** k once k * `decay_epochs` are over: a staircase. Below that, a warmup.

    Epochs count from step 0, warmup included. A stair begins at the step nearest to its place; timm's with an epoch.
    Source: Tan and Le, "EfficientNet", ICML 2019, section 5.2 (0.97 every 2.4 epochs); timm's `step` scheduler.
    """
    require(is_number(decay_rate) and 0 < decay_rate <= 1, 'exponential.decay_rate', decay_rate,
            'a number, above 0 and at most 1')
    require(is_number(decay_epochs) and decay_epochs > 0, 'exponential.decay_epochs', decay_epochs, 'a positive number')
    stair_steps = decay_epochs * steps_per_epoch
    return _after_warmup(
        # Half a step is more than float32 loses in the division: no stair is put off by its rounding.
        'exponential', lambda step, _: peak_rate * tf.exp(math.log(decay_rate) * tf.floor((step + 0.5) / stair_steps)),
        num_steps, steps_per_epoch, global_batch_size, peak_rate, warmup_epochs, initial_rate, rate_batch_size)


def constant_rate(peak_rate: float, *, num_steps: int, steps_per_epoch: float = 1.0,
                  global_batch_size: int | None = None, warmup_epochs: float = 0.0, initial_rate: float = 0.0,
                  rate_batch_size: int | None = None) -> Rate:
    """Warmup, then `peak_rate` for ever: for runs of no fixed length, evaluated by their moving average."""
    return _after_warmup('constant_rate', lambda *_: tf.fill([], float(peak_rate)), num_steps,
                         steps_per_epoch, global_batch_size, peak_rate, warmup_epochs, initial_rate, rate_batch_size)


def _after_warmup(name: str, decay: Callable, num_steps: int, steps_per_epoch: float, global_batch_size: int | None,
                  peak_rate: float, warmup_epochs: float, initial_rate: float, rate_batch_size: int | None) -> Rate:
    """The shared checks, warmup and scale; decay(step, progress), from 0 at the warmup's end to 1 at the schedule's."""
    for key, value in {'peak_rate': peak_rate, 'initial_rate': initial_rate, 'warmup_epochs': warmup_epochs}.items():
        require(is_number(value, 0), f'{name}.{key}', value, 'a number, at least 0')
    require(warmup_epochs > 0 or initial_rate == 0, f'{name}.initial_rate', initial_rate,
            f'0, or be followed by a warmup: bind {name}.warmup_epochs')
    require(rate_batch_size is None or global_batch_size is not None and is_number(rate_batch_size, 1, kind=int),
            f'{name}.rate_batch_size', rate_batch_size, 'None or a positive integer, None without a global_batch_size')
    warmup_steps = warmup_epochs * steps_per_epoch
    if warmup_steps >= num_steps:
        raise ConfigError(f'{name}.warmup_epochs is {warmup_epochs} ({warmup_steps:.0f} steps); it must end before the '
                          f'last of the {num_steps} steps of train.epochs')
    scale = global_batch_size / rate_batch_size if rate_batch_size else 1.0

    def rate(step: tf.Tensor) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        warmup = initial_rate + (peak_rate - initial_rate) * step / max(warmup_steps, 1e-9)
        progress = tf.clip_by_value((step - warmup_steps) / (num_steps - warmup_steps), 0.0, 1.0)
        return scale * tf.where(step < warmup_steps, warmup, decay(step, progress))

    return rate
