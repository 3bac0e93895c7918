"""SGD against Keras' at a constant rate, each optimizer against its published formulas, clipping against TensorFlow's.

tests/parity/test_torch_optimizers.py runs PyTorch and timm themselves.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer import optimizer
from trainer.recipe import ConfigError

SHAPES = {'stem/conv/kernel': (3, 3, 2, 4), 'stem/bn/gamma': (4,), 'stem/bn/beta': (4,), 'head/kernel': (4, 5),
          'head/bias': (5,), 'kernel/bias': (3,)}
KERNELS = ('stem/conv/kernel', 'head/kernel')
NUM_STEPS = 50
HYPER_PARAMETERS = list(itertools.product((0.0, 0.9), (False, True), (0.0, 1e-2)))


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}


@pytest.fixture
def grads():
    """One set of gradients a step."""
    rng = np.random.default_rng(1)
    return [{path: rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}
            for _ in range(NUM_STEPS)]


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


def assert_near(ours, theirs):
    """Each tensor as one vector, within a few roundings of float32."""
    assert ours.keys() == theirs.keys()
    for path, p in ours.items():
        assert np.linalg.norm(p - theirs[path]) < 1e-6 * np.linalg.norm(theirs[path]), path


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


# ---- RMSprop, AdamW, LAMB ----

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


# ---- Adaptive clipping ----

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
