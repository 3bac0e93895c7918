"""Each schedule against its closed form in float64; what they share, on all of them."""

import math

import numpy as np
import pytest
import tensorflow as tf

from trainer import schedule
from trainer.recipe import ConfigError

# 10.5 steps an epoch: the warmup of 2 epochs ends at step 21, the decay at step 100, its middle is step 60.5.
SETTINGS = {'num_steps': 100, 'steps_per_epoch': 10.5, 'warmup_epochs': 2, 'final_rate': 0.02}


def rates(steps, peak_rate=0.8, **settings):
    rate = schedule.cosine(peak_rate, **settings)
    return [float(rate(tf.constant(step, tf.int64))) for step in steps]


@pytest.mark.parametrize(
    ('step', 'expected'),
    [
        (0, 0.0),
        (7, 0.8 * 7 / 21),
        (20, 0.8 * 20 / 21),
        (21, 0.8),
        (60, 0.02 + 0.78 * 0.5 * (1 + math.cos(math.pi * 39 / 79))),
        (99, 0.02 + 0.78 * 0.5 * (1 + math.cos(math.pi * 78 / 79))),
        (100, 0.02),
        (101, 0.02),
        (10**6, 0.02),
    ],
)
def test_closed_form_with_warmup(step, expected):
    assert rates([step], **SETTINGS) == pytest.approx([expected], rel=1e-6, abs=1e-8)


def test_without_warmup_the_first_step_has_the_peak_and_the_middle_half_of_it():
    assert rates([0, 50, 100], num_steps=100) == pytest.approx([0.8, 0.4, 0.0], rel=1e-6, abs=1e-8)


def test_every_step_of_a_fractional_warmup():
    """2.5 steps of warmup: no step has a rate above the peak, and none is left out."""
    warmup, steps = 2.5, np.arange(12)
    decay = 0.4 * (1 + np.cos(np.pi * np.clip((steps - warmup) / (10 - warmup), 0, 1)))
    expected = np.where(steps < warmup, 0.8 * steps / warmup, decay)
    found = rates(steps, num_steps=10, steps_per_epoch=5, warmup_epochs=0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_is_a_float32_scalar_inside_a_graph_too():
    rate = tf.function(schedule.cosine(0.8, **SETTINGS))(tf.constant(21, tf.int64))
    assert (rate.dtype, rate.shape.as_list()) == (tf.float32, [])
    assert float(rate) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ('wrong', 'words'),
    [
        ({'peak_rate': -0.1}, ['cosine.peak_rate', '-0.1', 'at least 0']),
        ({'peak_rate': '0.1'}, ['cosine.peak_rate', "'0.1'", 'a number']),
        ({'final_rate': -1e-9}, ['cosine.final_rate', '-1e-09', 'at least 0']),
        ({'final_rate': float('nan')}, ['cosine.final_rate', 'nan', 'a number']),
        ({'warmup_epochs': -1}, ['cosine.warmup_epochs', '-1', 'at least 0']),
        ({'warmup_epochs': 10}, ['cosine.warmup_epochs', '10', '105 steps', 'before the last of the 100 steps']),
        ({'warmup_epochs': 10, 'steps_per_epoch': 10}, ['cosine.warmup_epochs', '100 steps']),
    ],
)
def test_wrong_values_are_named(wrong, words):
    with pytest.raises(ConfigError) as error:
        schedule.cosine(**{'peak_rate': 0.8, **SETTINGS, **wrong})
    assert [word for word in words if word not in str(error.value)] == []
    assert '\n' not in str(error.value)


# ---- The other schedules, and what all have in common ----

SCHEDULES = {'cosine': {}, 'linear': {}, 'exponential': {'decay_rate': 0.9, 'decay_epochs': 2.4}, 'constant_rate': {}}


def curve(name, steps, peak_rate=0.8, **settings):
    rate = getattr(schedule, name)(peak_rate, **{**SCHEDULES[name], **settings})
    return np.array([rate(tf.constant(step, tf.int64)).numpy() for step in steps])


def test_linear_is_a_straight_line():
    steps = np.arange(120)
    line = np.where(steps < 21, 0.8 * steps / 21, 0.8 - 0.78 * np.clip((steps - 21) / 79, 0, 1))
    np.testing.assert_allclose(curve('linear', steps, **SETTINGS), line, rtol=1e-6, atol=1e-7)
    assert curve('linear', [0, 50, 100], num_steps=100) == pytest.approx([0.8, 0.4, 0], rel=1e-6)


def test_exponential_is_a_staircase():
    """Stairs of 2.4 epochs of 10 steps, counted from the start; the first of them lies in the warmup."""
    steps = np.arange(450 * 10)
    stairs = 0.064 * 0.973 ** (steps // 24)
    expected = np.where(steps < 30, 0.064 * steps / 30, stairs)
    found = curve('exponential', steps, 0.064, num_steps=4500, steps_per_epoch=10, warmup_epochs=3, decay_rate=0.973,
                  decay_epochs=2.4)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert found[30] == pytest.approx(0.064 * 0.973)


def test_every_stair_of_a_long_run_begins_where_it_should():
    """ImageNet at 1024 images: 1251.1 steps an epoch, stairs of 3002.7 steps, far beyond the exact part of float32."""
    steps_per_epoch = 1281167 / 1024
    edges = [round(k * 2.4 * steps_per_epoch) for k in (1, 17, 93, 186)]
    steps = [step for edge in edges for step in (edge - 1, edge)]
    found = curve('exponential', steps, 1.0, num_steps=450 * 1252, steps_per_epoch=steps_per_epoch,
                  decay_rate=0.5 ** 0.1)
    expected = [0.5 ** (0.1 * k) for edge in (1, 17, 93, 186) for k in (edge - 1, edge)]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_a_constant_rate():
    assert curve('constant_rate', [0, 10, 20, 21, 99, 10**6], num_steps=100, steps_per_epoch=10.5,
                 warmup_epochs=2) == pytest.approx([0, 0.8 * 10 / 21, 0.8 * 20 / 21, 0.8, 0.8, 0.8], rel=1e-6)


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_warmup_may_start_above_zero(name):
    """d-li14's 0.1 to 0.4: the warmup alone is another."""
    steps, settings = np.arange(100), {'num_steps': 100, 'steps_per_epoch': 10, 'warmup_epochs': 2}
    found = curve(name, steps, 0.4, initial_rate=0.1, **settings)
    np.testing.assert_allclose(found[:20], 0.1 + 0.3 * steps[:20] / 20, rtol=1e-6)
    np.testing.assert_array_equal(found[20:], curve(name, steps[20:], 0.4, **settings))


@pytest.mark.parametrize('name', SCHEDULES)
def test_linear_scaling_multiplies_the_whole_curve(name):
    """0.016 for 256 images are 0.064 for 1024; without rate_batch_size the batch plays no part."""
    steps, settings = np.arange(0, 110, 3), {'num_steps': 100, 'steps_per_epoch': 10, 'warmup_epochs': 1.5,
                                             'initial_rate': 0.001}
    plain = curve(name, steps, 0.016, **settings)
    scaled = curve(name, steps, 0.016, rate_batch_size=256, global_batch_size=1024, **settings)
    np.testing.assert_array_equal(scaled, 4 * plain)
    halved = curve(name, steps, 0.016, rate_batch_size=256, global_batch_size=128, **settings)
    np.testing.assert_array_equal(halved, plain / 2)
    np.testing.assert_array_equal(curve(name, steps, 0.016, global_batch_size=1024, **settings), plain)


@pytest.mark.parametrize('name', SCHEDULES)
def test_is_the_same_float32_scalar_with_xla(name):
    rate = getattr(schedule, name)(0.8, num_steps=100, steps_per_epoch=10.5, warmup_epochs=2, **SCHEDULES[name])
    compiled = tf.function(rate, jit_compile=True)
    for step in (0, 20, 21, 60, 100):
        found = compiled(tf.constant(step, tf.int64))
        assert (found.dtype, found.shape.as_list()) == (tf.float32, [])
        assert float(found) == pytest.approx(float(rate(tf.constant(step, tf.int64))), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize(
    ('wrong', 'words'),
    [
        ({'peak_rate': -0.1}, ['peak_rate is -0.1', 'at least 0']),
        ({'peak_rate': None}, ['peak_rate is None', 'a number']),
        ({'warmup_epochs': '5'}, ["warmup_epochs is '5'", 'a number']),
        ({'warmup_epochs': 10}, ['warmup_epochs is 10 (105 steps)', 'before the last of the 100 steps']),
        ({'initial_rate': -1}, ['initial_rate is -1', 'at least 0']),
        ({'initial_rate': 0.1, 'warmup_epochs': 0}, ['initial_rate is 0.1', 'warmup_epochs']),
        ({'rate_batch_size': 0}, ['rate_batch_size is 0', 'None or a positive integer']),
        ({'rate_batch_size': 256.0}, ['rate_batch_size is 256.0', 'None or a positive integer']),
        ({'rate_batch_size': True}, ['rate_batch_size is True', 'None or a positive integer']),
        ({'rate_batch_size': 256, 'global_batch_size': None}, ['rate_batch_size is 256', 'global_batch_size']),
    ],
)
def test_wrong_values_of_what_all_share_are_named(name, wrong, words):
    right = {'peak_rate': 0.8, 'num_steps': 100, 'steps_per_epoch': 10.5, 'warmup_epochs': 2, 'global_batch_size': 512}
    with pytest.raises(ConfigError) as error:
        getattr(schedule, name)(**{**right, **SCHEDULES[name], **wrong})
    assert str(error.value).startswith(f'{name}.')
    assert [word for word in words if word not in str(error.value)] == []
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('name', 'wrong', 'words'),
    [
        ('linear', {'final_rate': -1e-9}, ['linear.final_rate', '-1e-09', 'at least 0']),
        ('exponential', {'decay_rate': 0}, ['exponential.decay_rate is 0', 'above 0 and at most 1']),
        ('exponential', {'decay_rate': 1.01}, ['exponential.decay_rate is 1.01', 'above 0 and at most 1']),
        ('exponential', {'decay_rate': '0.97'}, ["exponential.decay_rate is '0.97'", 'a number']),
        ('exponential', {'decay_epochs': 0}, ['exponential.decay_epochs is 0', 'a positive number']),
        ('exponential', {'decay_epochs': None}, ['exponential.decay_epochs is None', 'a positive number']),
    ],
)
def test_wrong_values_of_one_schedule_are_named(name, wrong, words):
    with pytest.raises(ConfigError) as error:
        getattr(schedule, name)(0.8, **{'num_steps': 100, **SCHEDULES[name], **wrong})
    assert [word for word in words if word not in str(error.value)] == []
    assert '\n' not in str(error.value)
