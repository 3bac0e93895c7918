"""Clipping by the global norm against TensorFlow's, adaptive clipping unit by unit against its definition."""

import numpy as np
import pytest
import tensorflow as tf

from trainer import optimizer


@pytest.mark.parametrize('clip_norm', [0.01, 1.0, 11.0, 1e4])
def test_clipping_as_tensorflow_does_it(grads, clip_norm):
    gradient = {path: tf.constant(g) for path, g in grads[0].items()}
    norm = tf.linalg.global_norm(list(gradient.values()))
    assert 1.0 < float(norm) < 1e4
    expected, _ = tf.clip_by_global_norm(list(gradient.values()), clip_norm)
    clipped = optimizer.clip_by_global_norm(gradient, norm, clip_norm)
    assert list(clipped) == list(gradient)
    for found, wanted in zip(clipped.values(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert float(tf.linalg.global_norm(list(clipped.values()))) == pytest.approx(min(clip_norm, float(norm)), rel=1e-6)


def test_gradients_of_zero_stay_zero():
    zeros = {'head/bias': tf.zeros([3])}
    clipped = optimizer.clip_by_global_norm(zeros, tf.constant(0.0), 1.0)
    np.testing.assert_array_equal(clipped['head/bias'], np.zeros(3))


@pytest.fixture
def kernels():
    """Of a convolution, a depthwise one, a bias, a dense layer that is not the last, the classifier."""
    rng = np.random.default_rng(2)
    shapes = {'conv/kernel': (3, 3, 2, 4), 'depthwise/kernel': (3, 3, 4, 1), 'conv/bias': (4,), 'dense/kernel': (4, 6),
              'classifier/kernel': (6, 5), 'classifier/bias': (5,)}
    return {path: tf.constant(rng.standard_normal(shape), tf.float32) for path, shape in shapes.items()}


def units(path, t):
    """The rows of a matrix: what computes one output channel."""
    if path == 'depthwise/kernel':
        return np.reshape(np.transpose(t, (2, 3, 0, 1)), (4, 9))
    return np.reshape(t, (1, -1)) if path.endswith('bias') else np.reshape(t, (-1, t.shape[-1])).T


@pytest.mark.parametrize('jit_compile', [False, True])
@pytest.mark.parametrize('clip_factor', [0.01, 0.5, 1.0, 100.0])
def test_no_unit_has_a_gradient_longer_than_its_share(kernels, clip_factor, jit_compile):
    rng = np.random.default_rng(3)
    grads = {path: tf.constant(rng.standard_normal(t.shape) * rng.uniform(0.1, 2, t.shape[-1]), tf.float32)
             for path, t in kernels.items()}
    clip = tf.function(lambda grads, params: optimizer.clip_adaptively(grads, params, clip_factor),
                       jit_compile=jit_compile)
    clipped, num_clipped = clip(grads, kernels), 0
    assert list(clipped) == list(grads)
    for path in kernels:
        if path.startswith('classifier'):
            np.testing.assert_array_equal(clipped[path], grads[path])
            continue
        for p, g, found in zip(*(units(path, t[path].numpy()) for t in (kernels, grads, clipped)), strict=True):
            largest = clip_factor * np.linalg.norm(np.float64(p))
            expected = g * min(1, largest / np.linalg.norm(np.float64(g)))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
            num_clipped += np.linalg.norm(g) > largest
    assert {0.01: num_clipped == 15, 100.0: num_clipped == 0}.get(clip_factor, 0 < num_clipped < 15)


def test_units_of_zeros_may_still_move(kernels):
    """As a bias at its start: the norm counts as 1e-3, and a gradient of zeros stays."""
    zeros = {path: tf.zeros_like(t) for path, t in kernels.items()}
    clipped = optimizer.clip_adaptively(kernels, zeros, 0.1)
    assert float(tf.norm(clipped['conv/bias'])) == pytest.approx(1e-4, rel=1e-5)
    for path, t in optimizer.clip_adaptively(zeros, kernels, 0.1).items():
        np.testing.assert_array_equal(t, zeros[path])
