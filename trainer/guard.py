"""Which steps are taken: pure maths.

Not those whose numbers are not finite or whose gradient leaps; after too many in a row none until the run rolls back.
"""
import tensorflow as tf

MEAN_DECAY = 0.99  # of the mean norm that a leap is measured against
MIN_NORMS = 20  # fewer are not enough to tell what is usual


def init_guard(spike_factor: float | None, rollback_after: int | None) -> dict[str, tf.Tensor]:
    """Scalars: float32 'mean_norm'; int64 'norms', how many it is of, 'skips_in_a_row', 'rollbacks'. {}: both None."""
    if spike_factor is None and rollback_after is None:
        return {}
    zero = tf.constant(0, tf.int64)
    return {'mean_norm': tf.constant(0.0), 'norms': zero, 'skips_in_a_row': zero, 'rollbacks': zero}


def next_guard(guard: dict[str, tf.Tensor], is_finite: tf.Tensor, norm: tf.Tensor, spike_factor: float | None,
               rollback_after: int | None,
               is_excused: tf.Tensor | bool = False) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """(whether the step is taken, the guard after it), from the guard before it, as `init_guard` gives it.

    is_finite, bool, and norm, float32, are scalars of the global gradient, the same on all replicas. A norm above
    spike_factor times the usual one is a leap. `rollback_after` skipped steps in a row are too many; is_excused, bool,
    says that this one, if it is skipped, is none of them: float16 looks for its loss scale.
    """
    if not guard:
        return is_finite, {}
    is_taken = is_finite
    if spike_factor is not None:
        is_taken &= (guard['norms'] < MIN_NORMS) | (norm <= spike_factor * guard['mean_norm'])
    counts = tf.constant(1, tf.int64)
    if rollback_after is not None:
        is_halted = guard['skips_in_a_row'] >= rollback_after
        is_taken &= ~is_halted
        counts = tf.where(is_excused & ~is_halted, tf.constant(0, tf.int64), counts)
    norms = guard['norms'] + 1
    weight = tf.maximum(1 - MEAN_DECAY, 1 / tf.cast(norms, tf.float32))
    mean = guard['mean_norm'] + weight * (norm - guard['mean_norm'])
    taken = guard | {'mean_norm': mean, 'norms': norms, 'skips_in_a_row': tf.constant(0, tf.int64)}
    skipped = guard | {'skips_in_a_row': guard['skips_in_a_row'] + counts}
    return is_taken, {name: tf.where(is_taken, taken[name], skipped[name]) for name in guard}
