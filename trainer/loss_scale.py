"""Dynamic loss scaling for mixed_float16: pure maths.

The gradients of small losses vanish in float16. So the loss is multiplied by a scale before the backward pass, and the
gradients are divided by it in float32; how large the scale may be is found out by going too far now and then.
"""
import tensorflow as tf

GROWTH_STEPS = 2000  # steps in a row that have to be finite before the scale doubles
MIN_SCALE, MAX_SCALE = 2.0**-14, 2.0**24  # float32 gradients, divided by any in between, keep all their digits


def init_loss_scale(precision: str) -> dict[str, tf.Tensor]:
    """{'loss_scale': float32 scalar, 'loss_scale_steps': int64 scalar, finite steps since it changed}, or nothing."""
    if precision != 'mixed_float16':
        return {}
    return {'loss_scale': tf.constant(2.0**15), 'loss_scale_steps': tf.constant(0, tf.int64)}


def next_loss_scale(state: dict[str, tf.Tensor], is_finite: tf.Tensor) -> dict[str, tf.Tensor]:
    """Half the scale after a step that was not finite, twice the scale after GROWTH_STEPS in a row that were.

    Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2, with the constants of NVIDIA's
    libraries. `state` is what `init_loss_scale` gives; is_finite: bool scalar, the same on all replicas.
    """
    if not state:
        return {}
    steps = state['loss_scale_steps'] + 1
    is_grown = steps >= GROWTH_STEPS
    factor = tf.where(is_finite, tf.where(is_grown, 2.0, 1.0), 0.5)
    return {'loss_scale': tf.clip_by_value(state['loss_scale'] * factor, MIN_SCALE, MAX_SCALE),
            'loss_scale_steps': tf.where(is_finite & ~is_grown, steps, 0)}
