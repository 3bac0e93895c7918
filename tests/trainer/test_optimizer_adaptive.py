"""RMSprop, AdamW and LAMB against their published formulas; tests/parity/ runs PyTorch and timm themselves."""

import numpy as np
import pytest
import tensorflow as tf
from optimizer_harness import KERNELS, NUM_STEPS, assert_near

from trainer import optimizer
from trainer.recipe import ConfigError

RATES = np.float32(0.05 * (1 + np.cos(np.linspace(0, 3, NUM_STEPS))))


def published_rmsprop(params, grads, learning_rates, *, decay=0.9, momentum=0.9, epsilon=1e-10, weight_decay=0.0):
    """tf.compat.v1.train.RMSPropOptimizer: ms <- rho ms + (1 - rho) g^2, mom <- m mom + lr g / sqrt(ms + epsilon)."""
    theta = {path: np.float64(p) for path, p in params.items()}
    ms, mom = {path: np.ones_like(p) for path, p in theta.items()}, {path: 0 * p for path, p in theta.items()}
    for rate, gradient in zip(np.float64(learning_rates), grads, strict=True):
        for path in theta:
            g = gradient[path] + weight_decay * theta[path] * (path in KERNELS)
            ms[path] = decay * ms[path] + (1 - decay) * g**2
            mom[path] = momentum * mom[path] + rate * g / np.sqrt(ms[path] + epsilon)
            theta[path] = theta[path] - mom[path]
    return theta


def published_adam(params, grads, learning_rates, is_lamb, *, beta_1=0.9, beta_2=0.999, epsilon, weight_decay=0.01):
    """Algorithm 1 of Adam; what the step makes of it, as AdamW's algorithm 2 or LAMB's, on kernels alone."""
    theta = {path: np.float64(p) for path, p in params.items()}
    m, v = ({path: 0 * p for path, p in theta.items()} for _ in range(2))
    for t, (rate, gradient) in enumerate(zip(np.float64(learning_rates), grads, strict=True), start=1):
        for path in theta:
            g = np.float64(gradient[path])
            m[path] = beta_1 * m[path] + (1 - beta_1) * g
            v[path] = beta_2 * v[path] + (1 - beta_2) * g**2
            r = m[path] / (1 - beta_1**t) / (np.sqrt(v[path] / (1 - beta_2**t)) + epsilon)
            if path in KERNELS:
                r = r + weight_decay * theta[path]
                if is_lamb and np.linalg.norm(theta[path]) > 0 and np.linalg.norm(r) > 0:
                    r = r * np.linalg.norm(theta[path]) / np.linalg.norm(r)
            theta[path] = theta[path] - rate * r
    return theta


def published_adamw(params, grads, learning_rates, *, epsilon=1e-8, **settings):
    return published_adam(params, grads, learning_rates, False, epsilon=epsilon, **settings)


def published_lamb(params, grads, learning_rates, *, epsilon=1e-6, **settings):
    return published_adam(params, grads, learning_rates, True, epsilon=epsilon, **settings)


PUBLISHED = {'rmsprop': published_rmsprop, 'adamw': published_adamw, 'lamb': published_lamb}
SETTINGS = [('rmsprop', {}), ('rmsprop', {'momentum': 0.0, 'weight_decay': 0.01}),
            ('rmsprop', {'decay': 0.95, 'epsilon': 1e-3, 'weight_decay': 1e-5}),
            ('adamw', {}), ('adamw', {'beta_1': 0.6, 'beta_2': 0.99, 'epsilon': 1e-3, 'weight_decay': 0.1}),
            ('adamw', {'weight_decay': 0.0}),
            ('lamb', {}), ('lamb', {'beta_1': 0.8, 'epsilon': 1e-3, 'weight_decay': 0.1}),
            ('lamb', {'weight_decay': 0.0})]


def run_named(name, params, grads, learning_rates, jit_compile=False, **settings):
    """(params, slots) after as many steps as there are rates."""
    init, update = getattr(optimizer, name)(**settings)
    update = tf.function(update, jit_compile=jit_compile)
    params = {path: tf.constant(p) for path, p in params.items()}
    slots = init(params)
    for step, rate in enumerate(learning_rates):
        params, slots = update({path: tf.constant(g) for path, g in grads[step].items()}, slots, params,
                               tf.constant(rate, tf.float32), tf.constant(step, tf.int64))
    return {path: p.numpy() for path, p in params.items()}, slots


@pytest.mark.parametrize(('name', 'settings'), SETTINGS)
def test_changing_rates_as_published(params, grads, name, settings):
    ours, _ = run_named(name, params, grads, RATES, **settings)
    assert_near(ours, PUBLISHED[name](params, grads, RATES, **settings))
    assert all(np.linalg.norm(ours[path] - params[path]) > 0.1 for path in params)


@pytest.mark.parametrize('name', ['sgd', *PUBLISHED])
def test_xla_computes_the_same(params, grads, name):
    ours, slots = run_named(name, params, grads[:5], RATES[:5], weight_decay=0.01)
    compiled, compiled_slots = run_named(name, params, grads[:5], RATES[:5], jit_compile=True, weight_decay=0.01)
    assert_near(compiled, ours)
    for slot, tensors in slots.items():
        assert_near({path: t.numpy() for path, t in compiled_slots[slot].items()},
                    {path: t.numpy() for path, t in tensors.items()})


@pytest.mark.parametrize('name', PUBLISHED)
def test_weight_decay_is_for_kernels(params, grads, name):
    """Whatever the decay, all else goes the same way to the last bit."""
    with_decay, _ = run_named(name, params, grads[:3], RATES[:3], weight_decay=0.5)
    without, _ = run_named(name, params, grads[:3], RATES[:3], weight_decay=0.0)
    assert {path for path in params if not np.array_equal(with_decay[path], without[path])} == set(KERNELS)


def test_decoupled_decay_does_not_enter_the_moments(params):
    zeros = {path: np.zeros_like(p) for path, p in params.items()}
    after, slots = run_named('adamw', params, [zeros], [0.5], weight_decay=0.5)
    for path, p in params.items():
        np.testing.assert_array_equal(after[path], p * np.float32(0.75 if path in KERNELS else 1))
        np.testing.assert_array_equal(slots['first_moment'][path], zeros[path])


def test_a_step_of_lamb_is_as_long_as_rate_and_kernel_say(params, grads):
    after, _ = run_named('lamb', params, grads, [0.1])
    for path in KERNELS:
        assert np.linalg.norm(after[path] - params[path]) == pytest.approx(0.1 * np.linalg.norm(params[path]), rel=1e-5)


def test_lamb_starts_a_kernel_of_zeros_and_stands_still_without_gradient(params):
    """The ratio of norms is 1 where one of them is 0: neither stuck nor NaN."""
    zero, one = {'a/kernel': np.zeros((2, 2), np.float32)}, {'a/kernel': np.ones((2, 2), np.float32)}
    after, _ = run_named('lamb', zero, [one], [0.1])
    np.testing.assert_allclose(after['a/kernel'], -0.1, rtol=1e-5)
    after, _ = run_named('lamb', one, [zero], [0.1], weight_decay=0.0)
    np.testing.assert_array_equal(after['a/kernel'], one['a/kernel'])


def test_names_and_initial_values_of_the_slots(params):
    """They are the names in a checkpoint; RMSprop's mean square starts at one, as TensorFlow 1 has it."""
    initial = {'rmsprop': {'mean_square': 1, 'momentum': 0}, 'adamw': {'first_moment': 0, 'second_moment': 0},
               'lamb': {'first_moment': 0, 'second_moment': 0}}
    for name, values in initial.items():
        init, update = getattr(optimizer, name)()
        slots = init({path: tf.constant(p) for path, p in params.items()})
        assert list(slots) == list(values)
        for slot, value in values.items():
            for path, t in slots[slot].items():
                np.testing.assert_array_equal(t, np.full_like(params[path], value))
        _, after = update(params, slots, params, tf.constant(0.1), tf.constant(0, tf.int64))
        assert {slot: list(tensors) for slot, tensors in after.items()} == {slot: list(params) for slot in values}


@pytest.mark.parametrize(
    ('name', 'wrong', 'words'),
    [
        ('rmsprop', {'decay': 1.0}, ['rmsprop.decay is 1.0', 'below 1']),
        ('rmsprop', {'momentum': -0.1}, ['rmsprop.momentum is -0.1', 'at least 0']),
        ('rmsprop', {'epsilon': 0}, ['rmsprop.epsilon is 0', 'a positive number']),
        ('rmsprop', {'weight_decay': '1e-5'}, ["rmsprop.weight_decay is '1e-5'", 'a number']),
        ('adamw', {'beta_1': 1}, ['adamw.beta_1 is 1', 'above 0 and below 1']),
        ('adamw', {'beta_2': 0.0}, ['adamw.beta_2 is 0.0', 'above 0 and below 1']),
        ('adamw', {'epsilon': -1e-8}, ['adamw.epsilon is -1e-08', 'a positive number']),
        ('adamw', {'weight_decay': float('nan')}, ['adamw.weight_decay is nan', 'at least 0']),
        ('lamb', {'beta_1': (0.9, 0.999)}, ['lamb.beta_1 is (0.9, 0.999)', 'a number']),
        ('lamb', {'epsilon': None}, ['lamb.epsilon is None', 'a positive number']),
        ('lamb', {'weight_decay': -0.05}, ['lamb.weight_decay is -0.05', 'at least 0']),
    ],
)
def test_wrong_values_of_the_others_are_named(name, wrong, words):
    with pytest.raises(ConfigError) as error:
        getattr(optimizer, name)(**wrong)
    assert [word for word in words if word not in str(error.value)] == []
    assert '\n' not in str(error.value)
