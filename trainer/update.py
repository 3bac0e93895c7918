"""The other of the two pure functions of a step: update, from summed gradients to new values, or to the old ones."""
from collections.abc import Callable

import tensorflow as tf

from trainer.ema import ema_update
from trainer.guard import next_guard
from trainer.loss_scale import MIN_SCALE, next_loss_scale
from trainer.optimizer import clip_adaptively, clip_by_global_norm
from trainer.recipe import Train
from trainer.state import Tensors, Values


def make_update(update_fn: Callable, schedule: Callable[[tf.Tensor], tf.Tensor],
                settings: Train) -> Callable[..., tuple[Values, tf.Tensor, tf.Tensor]]:
    """Makes update(values, grads, new_stats, loss, step) -> (values, is_taken, gradient norm).

    A gradient, statistic or loss whose square is not finite, or whatever else guard.py refuses, leaves all values but
    loss scale and guard as they are. update_fn is the optimizer's, see optimizer.py; schedule: step -> learning rate.
    """
    def update(values: Values, grads: Tensors, new_stats: Tensors, loss: tf.Tensor, step: tf.Tensor):
        params, batch_stats, slots, ema, loss_scale, guard = values
        if loss_scale:
            grads = {path: g / loss_scale['loss_scale'] for path, g in grads.items()}
        norm = tf.linalg.global_norm(list(grads.values()))
        is_finite = tf.math.is_finite(tf.linalg.global_norm([norm, loss, *new_stats.values()]))
        is_searching = ~is_finite & (loss_scale['loss_scale'] > MIN_SCALE) if loss_scale else False
        is_taken, new_guard = next_guard(guard, is_finite, norm, settings.spike_factor, settings.rollback_after,
                                         is_searching)

        def take():
            clipped = grads
            if settings.clip_norm is not None:
                clipped = clip_by_global_norm(grads, norm, settings.clip_norm)
            elif settings.adaptive_clip is not None:
                clipped = clip_adaptively(grads, params, settings.adaptive_clip)
            new_params, new_slots = update_fn(clipped, slots, params, schedule(step), step)
            new_ema = ema_update(ema, new_params | new_stats, settings.ema_decay, step) if ema else {}
            return new_params, new_slots, new_ema

        # All replicas see the same sums, so that all take the step or none does. No collective stands in the branches.
        params, slots, ema = tf.cond(is_taken, take, lambda: (params, slots, ema))
        # Small and many: they are chosen here, as each output of a branch takes its time to trace.
        stats = {path: tf.where(is_taken, new, batch_stats[path]) for path, new in new_stats.items()}
        return Values(params, stats, slots, ema, next_loss_scale(loss_scale, is_finite), new_guard), is_taken, norm

    return update
