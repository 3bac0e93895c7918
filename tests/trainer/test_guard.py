"""Which steps are taken, against the same rule written with Python's own numbers."""

import math

import numpy as np
import pytest
import tensorflow as tf

from trainer.guard import MEAN_DECAY, MIN_NORMS, init_guard, next_guard


def by_hand(norms, spike_factor, rollback_after):
    """Of each step whether it is taken, and the number of skipped ones in a row after it."""
    mean, count, in_a_row, found = 0.0, 0, 0, []
    for norm in norms:
        is_usual = math.isfinite(norm) and not (
            spike_factor and count >= MIN_NORMS and norm > spike_factor * mean)
        is_taken = is_usual and not (rollback_after and in_a_row >= rollback_after)
        if is_taken:
            count += 1
            mean += max(1 - MEAN_DECAY, 1 / count) * (norm - mean)
        in_a_row = 0 if is_taken else in_a_row + 1
        found.append((is_taken, in_a_row))
    return found


@pytest.mark.parametrize(('spike_factor', 'rollback_after'), [(4.0, None), (None, 3), (4.0, 3)])
def test_as_by_hand(spike_factor, rollback_after):
    rng = np.random.default_rng(0)
    norms = rng.uniform(1, 2, 300).astype(np.float32)
    norms[::11] = np.nan
    norms[40:300:17] *= 8
    norms[3] = 100  # nothing is usual yet
    norms[200:204] = np.inf
    guard, found = init_guard(spike_factor, rollback_after), []
    for norm in norms:
        is_taken, guard = next_guard(guard, tf.math.is_finite(norm), tf.constant(norm), spike_factor, rollback_after)
        found.append((bool(is_taken), int(guard['skips_in_a_row'])))
    assert found == by_hand(norms.tolist(), spike_factor, rollback_after)
    assert {taken for taken, _ in found} == {True, False}
    if rollback_after:  # the host comes too late, and it makes no difference
        assert not any(taken for taken, _ in found[204:])


def test_without_a_guard_the_finite_ones_are_taken():
    assert init_guard(None, None) == {}
    for is_finite in (True, False):
        assert next_guard({}, tf.constant(is_finite), tf.constant(1e9), None, None) == (tf.constant(is_finite), {})


def test_looking_for_a_loss_scale_is_no_reason_to_go_back():
    guard = init_guard(None, 3)
    for is_excused, in_a_row in ((True, 0), (False, 1), (True, 1), (False, 2), (False, 3), (True, 4)):
        is_taken, guard = next_guard(guard, tf.constant(False), tf.constant(1.0), None, 3, tf.constant(is_excused))
        assert not is_taken and int(guard['skips_in_a_row']) == in_a_row  # once it has halted each step counts
