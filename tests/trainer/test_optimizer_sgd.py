"""SGD against Keras' at a constant rate, and as PyTorch documents it; tests/parity/ runs PyTorch itself."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from optimizer_harness import KERNELS, NUM_STEPS, assert_near

from trainer import optimizer
from trainer.recipe import ConfigError

HYPER_PARAMETERS = list(itertools.product((0.0, 0.9), (False, True), (0.0, 1e-2)))


def run_ours(params, grads, learning_rates, **hyper_parameters):
    init, update = optimizer.sgd(**hyper_parameters)
    update = tf.function(update)
    params = {path: tf.constant(p) for path, p in params.items()}
    slots = init(params)
    for step, learning_rate in enumerate(learning_rates):
        gradient = {path: tf.constant(g) for path, g in grads[step].items()}
        params, slots = update(gradient, slots, params, tf.constant(learning_rate, tf.float32),
                               tf.constant(step, tf.int64))
    return {path: p.numpy() for path, p in params.items()}


def run_documented(params, grads, learning_rates, *, momentum, nesterov, weight_decay):
    """torch.optim.SGD's documentation, line by line, in float64: dampening 0, maximize False."""
    theta = {path: np.float64(p) for path, p in params.items()}
    b = {}
    for t, (gamma, gradient) in enumerate(zip(learning_rates, grads, strict=True), start=1):
        for path in theta:
            g = np.float64(gradient[path])
            if weight_decay != 0 and path in KERNELS:
                g = g + weight_decay * theta[path]
            if momentum != 0:
                b[path] = momentum * b[path] + g if t > 1 else g
                g = g + momentum * b[path] if nesterov else b[path]
            theta[path] = theta[path] - gamma * g
    return theta


def run_keras(params, grads, learning_rate, *, momentum, nesterov, weight_decay):
    """Keras' update is PyTorch's while the rate stays; its weight decay is not, so the L2 goes into the gradient."""
    sgd = keras.optimizers.SGD(learning_rate, momentum=momentum, nesterov=nesterov)
    variables = {path: keras.Variable(p, dtype='float32') for path, p in params.items()}
    for gradient in grads:
        coupled = [gradient[path] + (weight_decay * v.numpy() if path in KERNELS else 0)
                   for path, v in variables.items()]
        sgd.apply([tf.constant(g, tf.float32) for g in coupled], list(variables.values()))
    return {path: v.numpy() for path, v in variables.items()}


@pytest.mark.parametrize(('momentum', 'nesterov', 'weight_decay'), HYPER_PARAMETERS)
def test_changing_rates_as_pytorch_documents_it(params, grads, momentum, nesterov, weight_decay):
    hyper_parameters = {'momentum': momentum, 'nesterov': nesterov, 'weight_decay': weight_decay}
    learning_rates = np.float32(0.1 * (1 + np.cos(np.linspace(0, 3, NUM_STEPS))))
    ours = run_ours(params, grads, learning_rates, **hyper_parameters)
    assert_near(ours, run_documented(params, grads, learning_rates, **hyper_parameters))
    assert all(np.linalg.norm(ours[path] - params[path]) > 0.1 for path in params)


@pytest.mark.parametrize(('momentum', 'nesterov', 'weight_decay'), HYPER_PARAMETERS)
def test_a_constant_rate_as_keras_computes_it(params, grads, momentum, nesterov, weight_decay):
    hyper_parameters = {'momentum': momentum, 'nesterov': nesterov, 'weight_decay': weight_decay}
    assert_near(run_ours(params, grads, [0.05] * NUM_STEPS, **hyper_parameters),
                run_keras(params, grads, 0.05, **hyper_parameters))


def test_only_kernels_decay(params):
    """With gradients of zero, a step of rate 1 takes weight_decay * p from the kernels, nothing from the others."""
    zeros = {path: np.zeros_like(p) for path, p in params.items()}
    after = run_ours(params, [zeros], [1.0], momentum=0.0, weight_decay=0.25)
    for path, p in params.items():
        np.testing.assert_array_equal(after[path], p * np.float32(0.75 if path in KERNELS else 1))


def test_slots_mirror_the_parameters(params):
    init, update = optimizer.sgd()
    params = {path: tf.constant(p) for path, p in params.items()}
    slots = init(params)
    assert {slot: {path: t.shape for path, t in tensors.items()} for slot, tensors in slots.items()} == {
        'momentum': {path: p.shape for path, p in params.items()}}
    _, slots = update(params, slots, params, 0.1, 0)
    for path, velocity in slots['momentum'].items():
        np.testing.assert_array_equal(velocity, params[path])  # the first velocity is the gradient


@pytest.mark.parametrize(
    ('wrong', 'words'),
    [
        ({'momentum': 1.0}, ['sgd.momentum', '1.0', 'below 1']),
        ({'momentum': -0.1}, ['sgd.momentum', '-0.1', 'at least 0']),
        ({'momentum': '0.9'}, ['sgd.momentum', "'0.9'", 'a number']),
        ({'weight_decay': -1e-4}, ['sgd.weight_decay', '-0.0001', 'at least 0']),
        ({'weight_decay': None}, ['sgd.weight_decay', 'None', 'a number']),
        ({'nesterov': 'yes'}, ['sgd.nesterov', "'yes'", 'True or False']),
    ],
)
def test_wrong_values_are_named(wrong, words):
    with pytest.raises(ConfigError) as error:
        optimizer.sgd(**wrong)
    assert [word for word in words if word not in str(error.value)] == []
    assert '\n' not in str(error.value)
