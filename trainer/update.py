"""The other of the two pure functions of a step: update, from summed gradients to new values, or to the old ones."""
from collections.abc import Callable

import tensorflow as tf

from trainer.ema import ema_update
from trainer.loss_scale import next_loss_scale
from trainer.optimizer import clip_adaptively, clip_by_global_norm
from trainer.recipe import Train
from trainer.state import Tensors, Values


def make_update(update_fn: Callable, schedule: Callable[[tf.Tensor], tf.Tensor],
                settings: Train) -> Callable[..., tuple[Values, tf.Tensor, tf.Tensor]]:
    """Makes update(values, grads, new_stats, step) -> (values, is_finite, gradient norm).

    A gradient or statistic that is not finite leaves all values but the loss scale as they are. update_fn is the
    optimizer's, see optimizer.py; schedule: step -> learning rate.
    """
    clip_norm, adaptive_clip = settings.clip_norm, settings.adaptive_clip

    def update(values: Values, grads: Tensors, new_stats: Tensors, step: tf.Tensor):
        params, batch_stats, slots, ema, loss_scale = values
        if loss_scale:
            grads = {path: g / loss_scale['loss_scale'] for path, g in grads.items()}
        norm = tf.linalg.global_norm(list(grads.values()))
        is_finite = tf.math.is_finite(norm) & tf.reduce_all([tf.reduce_all(tf.math.is_finite(s))
                                                             for s in new_stats.values()])

        def take():
            clipped = grads if clip_norm is None else clip_by_global_norm(grads, norm, clip_norm)
            clipped = clipped if adaptive_clip is None else clip_adaptively(clipped, params, adaptive_clip)
            new_params, new_slots = update_fn(clipped, slots, params, schedule(step), step)
            new_ema = ema_update(ema, new_params | new_stats, settings.ema_decay, step) if ema else {}
            return new_params, new_stats, new_slots, new_ema

        # All replicas see the same sums, so that all take the step or none does. No collective stands in the branches.
        kept = tf.cond(is_finite, take, lambda: (params, batch_stats, slots, ema))
        return Values(*kept, next_loss_scale(loss_scale, is_finite)), is_finite, norm

    return update
