"""The loss scale halves, doubles and stays within its range, as the rule in its docstring says step by step."""
import pytest
import tensorflow as tf

from trainer.loss_scale import GROWTH_STEPS, MAX_SCALE, MIN_SCALE, init_loss_scale, next_loss_scale


def follow(scale, steps, is_finite, *, jit=False):
    function = tf.function(next_loss_scale, jit_compile=jit)
    state = function({'loss_scale': tf.constant(scale), 'loss_scale_steps': tf.constant(steps, tf.int64)},
                     tf.constant(is_finite))
    assert state['loss_scale'].dtype == tf.float32 and state['loss_scale_steps'].dtype == tf.int64
    return float(state['loss_scale']), int(state['loss_scale_steps'])


@pytest.mark.parametrize('jit', [False, True])
def test_a_step_that_is_not_finite_halves_the_scale_and_counts_anew(jit):
    assert follow(1024.0, 77, False, jit=jit) == (512.0, 0)
    assert follow(1024.0, GROWTH_STEPS - 1, False, jit=jit) == (512.0, 0)


@pytest.mark.parametrize('jit', [False, True])
def test_enough_finite_steps_in_a_row_double_it(jit):
    assert follow(1024.0, 0, True, jit=jit) == (1024.0, 1)
    assert follow(1024.0, GROWTH_STEPS - 2, True, jit=jit) == (1024.0, GROWTH_STEPS - 1)
    assert follow(1024.0, GROWTH_STEPS - 1, True, jit=jit) == (2048.0, 0)


def test_it_stays_in_its_range():
    assert follow(MAX_SCALE, GROWTH_STEPS - 1, True)[0] == MAX_SCALE
    assert follow(MIN_SCALE, 5, False)[0] == MIN_SCALE


@pytest.mark.parametrize('precision', ['float32', 'mixed_bfloat16'])
def test_only_float16_has_one(precision):
    assert init_loss_scale(precision) == {} == next_loss_scale({}, tf.constant(True))
    assert {name: float(t) for name, t in init_loss_scale('mixed_float16').items()} == {
        'loss_scale': 2.0**15, 'loss_scale_steps': 0}
