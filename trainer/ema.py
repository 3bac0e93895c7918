"""Exponential moving average of parameters and batch statistics: pure maths."""
import tensorflow as tf


def ema_update(ema: dict[str, tf.Tensor], weights: dict[str, tf.Tensor], decay: float,
               step: tf.Tensor) -> dict[str, tf.Tensor]:
    """ema + (1 - d) * (weights - ema), d = min(decay, (1 + step) / (10 + step)), of float32 tensors of the same paths.

    d rises as in tf.train.ExponentialMovingAverage, to forget the initial weights. step: updates before; decay: [0, 1).
    """
    step = tf.cast(step, tf.float32)
    rate = 1 - tf.minimum(decay, (1 + step) / (10 + step))
    return {path: average + rate * (weights[path] - average) for path, average in ema.items()}
