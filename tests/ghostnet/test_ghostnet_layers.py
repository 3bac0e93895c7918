"""The layers against closed forms in NumPy: padding, squeeze-and-excite, batch norm, initialisation, dropout."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from ghostnet.keyed import KeyedDropout, keyed_uniform, mix_bits, row_keys, step_context
from ghostnet.layers import BatchNorm, Conv, DepthwiseConv, GhostModule, SqueezeExcite


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def padded_windows(x, kernel_size, strides):
    """[B, H, W, C] -> [B, ceil(H / s), ceil(W / s), k, k, C] with k // 2 zeros on every side, as PyTorch's padding."""
    pad = kernel_size // 2
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (kernel_size, kernel_size), axis=(1, 2))
    return np.moveaxis(windows[:, ::strides, ::strides], 3, -1)


def randomise(layer, rng):
    for v in layer.weights:
        v.assign(rng.uniform(0.5, 1.5, v.shape) if v.name == 'moving_variance' else rng.normal(size=v.shape))


@pytest.mark.parametrize('size', [(8, 8), (7, 9), (1, 2)])
@pytest.mark.parametrize('strides', [1, 2])
@pytest.mark.parametrize('kernel_size', [1, 3, 5])
def test_convolutions_pad_as_pytorch(kernel_size, strides, size, rng):
    x = rng.normal(size=(2, *size, 4)).astype(np.float32)
    windows = padded_windows(x, kernel_size, strides)
    conv, depthwise = Conv(6, kernel_size, strides, use_bias=True), DepthwiseConv(kernel_size, strides)
    for layer in (conv, depthwise):
        layer.build(x.shape)
        randomise(layer, rng)
    expected = np.einsum('bhwijc,ijco->bhwo', windows, conv.kernel.numpy()) + conv.bias.numpy()
    np.testing.assert_allclose(conv(x), expected, atol=1e-4)
    expected = np.einsum('bhwijc,ijc->bhwc', windows, depthwise.kernel.numpy()[..., 0])
    np.testing.assert_allclose(depthwise(x), expected, atol=1e-4)
    assert depthwise(x).shape[1:3] == tuple(math.ceil(n / strides) for n in size)


def test_squeeze_excite_gates_by_a_hard_sigmoid(rng):
    x = rng.normal(1, 4, size=(8, 5, 3, 6)).astype(np.float32)
    layer = SqueezeExcite(6, 4)
    layer.build(x.shape)
    randomise(layer, rng)
    reduce, reduce_bias, expand, expand_bias = (v.numpy() for v in layer.weights)
    hidden = np.maximum(x.mean((1, 2)) @ reduce[0, 0] + reduce_bias, 0)
    gate = np.clip((hidden @ expand[0, 0] + expand_bias + 3) / 6, 0, 1)
    assert (gate == 0).any() and (gate == 1).any() and ((gate > 0) & (gate < 1)).any()
    np.testing.assert_allclose(layer(x), x * gate[:, None, None], atol=1e-4)


@pytest.mark.parametrize('filters', [6, 7])
def test_the_cheap_half_is_computed_from_the_activated_primary_half(filters, rng):
    x = rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    layer = GhostModule(filters)
    layer.build(x.shape)
    randomise(layer, rng)

    def normalised(y, bn):
        mean, variance = bn.moving_mean.numpy(), bn.moving_variance.numpy()
        return np.maximum((y - mean) / np.sqrt(variance + 1e-5) * bn.gamma.numpy() + bn.beta.numpy(), 0)

    primary = normalised(x @ layer.primary.conv.kernel.numpy()[0, 0], layer.primary.bn)
    windows = padded_windows(primary, 3, 1)
    cheap = normalised(np.einsum('bhwijc,ijc->bhwc', windows, layer.cheap.conv.kernel.numpy()[..., 0]), layer.cheap.bn)
    expected = np.concatenate([primary, cheap], axis=-1)[..., :filters]
    np.testing.assert_allclose(layer(x), expected, atol=1e-4)


def batch_norm(x, rng, **kwargs):
    layer = BatchNorm(**kwargs)
    layer.build(x.shape)
    randomise(layer, rng)
    return layer, *(v.numpy().astype(np.float64) for v in layer.weights)


@pytest.mark.parametrize(('momentum', 'epsilon'), [(0.9, 1e-5), (0.99, 1e-3)])
def test_batch_norm_in_training_keeps_the_unbiased_variance(momentum, epsilon, rng):
    x = rng.normal(2, 0.1, size=(4, 3, 2, 5)).astype(np.float32)
    layer, gamma, beta, moving_mean, moving_variance = batch_norm(x, rng, momentum=momentum, epsilon=epsilon)
    y = layer(x, training=True)
    mean, variance = x.mean((0, 1, 2), np.float64), x.var((0, 1, 2), np.float64)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + epsilon) * gamma + beta, atol=1e-4)
    np.testing.assert_allclose(layer.moving_mean, momentum * moving_mean + (1 - momentum) * mean, rtol=1e-5)
    unbiased = variance * 24 / 23
    np.testing.assert_allclose(layer.moving_variance, momentum * moving_variance + (1 - momentum) * unbiased, rtol=1e-5)


def test_batch_norm_has_the_constants_of_pytorch():
    assert (BatchNorm().momentum, BatchNorm().epsilon) == (0.9, 1e-5)


def test_batch_norm_in_inference_takes_the_moving_statistics(rng):
    x = rng.normal(size=(4, 3, 2, 5)).astype(np.float32)
    layer, gamma, beta, mean, variance = batch_norm(x, rng)
    y = layer(x, training=False)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta, atol=1e-5)
    np.testing.assert_array_equal(layer.moving_mean, mean.astype(np.float32))
    np.testing.assert_array_equal(layer.moving_variance, variance.astype(np.float32))


def test_batch_norm_keeps_float32_statistics_of_bfloat16_images(rng):
    x = tf.cast(rng.normal(size=(4, 3, 2, 5)), tf.bfloat16)
    layer, _, _, moving_mean, _ = batch_norm(x, rng, dtype='mixed_bfloat16')
    for training in (True, False):
        assert layer(x, training=training).dtype == tf.bfloat16
    assert {v.dtype for v in layer.weights} == {'float32'}
    mean = np.mean(tf.cast(x, tf.float32), (0, 1, 2))
    np.testing.assert_allclose(layer.moving_mean, 0.9 * moving_mean + 0.1 * mean, rtol=1e-4)


def gradients(layer, x, dy, call):
    """Gradients of sum(y * dy) by x, gamma and beta, and the outputs."""
    variables = [layer.gamma.value, layer.beta.value]
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = call(x)
        loss = tf.reduce_sum(y * dy)
    return y, tape.gradient(loss, [x, *variables])


def reduction(known, unknown):
    """A cross_replica_mean that gives what is known, one call after the other, and after that collects what it gets."""
    known = iter(known)

    def cross_replica_mean(t):
        value = next(known, None)
        if value is None:
            unknown.append(t)
        return t if value is None else value

    return cross_replica_mean


def test_synchronised_halves_equal_the_full_batch(rng):
    x = tf.constant(rng.normal(1, 2, size=(8, 3, 3, 5)) + np.arange(8).reshape(8, 1, 1, 1), tf.float32)
    dy = tf.constant(rng.normal(size=x.shape), tf.float32)
    layer, *_ = batch_norm(x, rng)
    before = layer.get_weights()
    y_full, grads_full = gradients(layer, x, dy, lambda x: layer(x, training=True))
    after_full = layer.get_weights()

    def halves(x):
        """Two replicas in turn: each of the two reductions is collected first, then both are given the means."""
        means, statistics, ys = [], [], []
        for _ in range(2):
            collected = []
            for half in tf.split(x, 2):
                with step_context(cross_replica_mean=reduction(means, unknown := []), num_replicas=2):
                    layer(half, training=True)
                collected.append(unknown[0])
            means.append(sum(collected) / 2)
        for half in tf.split(x, 2):
            layer.set_weights(before)
            with step_context(cross_replica_mean=reduction(means, unknown := []), num_replicas=2):
                ys.append(layer(half, training=True))
            assert not unknown
            statistics.append(layer.get_weights())
        for a, b, full in zip(*statistics, after_full):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(a, full, rtol=1e-5)
        return tf.concat(ys, 0)

    y_halves, grads_halves = gradients(layer, x, dy, halves)
    np.testing.assert_allclose(y_halves, y_full, atol=1e-5)
    for a, b in zip(grads_halves, grads_full):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_synchronised_variance_of_a_large_mean_keeps_its_digits():
    """Two constant halves at 1000 and 1000.5: as a difference of squares the variance would be rounding alone."""
    layer = BatchNorm()
    layer.build((None, 4, 4, 1))
    half = np.full((2, 4, 4, 1), 1000, np.float32)
    with step_context(cross_replica_mean=reduction([tf.constant([1000.25])], unknown := []), num_replicas=2):
        layer(half, training=True)
    np.testing.assert_allclose(unknown[0], [0.25**2], rtol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, [0.9 + 0.1 * 0.25**2 * 64 / 63], rtol=1e-6)


@pytest.mark.parametrize(('layer', 'channels', 'fan_in'), [
    (Conv(400), 300, 300), (Conv(200, 3), 50, 450), (DepthwiseConv(3), 20000, 9), (DepthwiseConv(5), 8000, 25)])
def test_kernels_start_uniform_in_one_by_the_root_of_fan_in(layer, channels, fan_in):
    keras.utils.set_random_seed(0)
    layer.build((None, None, None, channels))
    kernel, bound = layer.kernel.numpy(), 1 / math.sqrt(fan_in)
    std = bound / math.sqrt(3)  # of a uniform distribution
    assert kernel.std() == pytest.approx(std, rel=0.02)
    assert abs(kernel.mean()) < 5 * std / math.sqrt(kernel.size)
    assert bound * 0.99 < np.abs(kernel).max() <= bound * (1 + 1e-6)


def test_the_hash_is_the_finaliser_of_murmurhash3():
    # MurmurHash3_x86_32 of the empty string is its finaliser applied to the seed: published vectors of seeds 0, 1, -1
    hashes = mix_bits(tf.constant([0, 1, 0xFFFFFFFF], tf.uint32)).numpy()
    assert [hex(h) for h in hashes] == ['0x0', '0x514e28b7', '0x81f16f39']


def test_every_input_bit_of_the_hash_changes_every_output_bit_half_of_the_time(rng):
    num = 20000
    x = rng.integers(2**32, size=num, dtype=np.uint32)
    hashes = mix_bits(tf.constant(x)).numpy()
    for bit in range(32):
        changed = hashes ^ mix_bits(tf.constant(x ^ np.uint32(1 << bit))).numpy()
        rates = np.unpackbits(changed.view(np.uint8).reshape(num, 4), axis=1).mean(0)
        assert np.abs(rates - 0.5).max() < 0.03


@pytest.fixture(scope='module')
def uniform():
    """1024 rows of 1280 elements, as a step of training draws them for the dropout before the classifier."""
    return keyed_uniform(row_keys(0, tf.constant(7), tf.constant(0), 1024), 1280).numpy()


def test_drawn_numbers_are_uniform(uniform):
    n = uniform.size
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(uniform.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    for num_bins in (64, 1000):
        counts = np.histogram(uniform, num_bins, (0, 1))[0]
        chi_square = ((counts - n / num_bins) ** 2 / (n / num_bins)).sum()
        assert abs(chi_square - (num_bins - 1)) < 5 * math.sqrt(2 * (num_bins - 1))
    bits = (uniform * 2**24).astype(np.uint32)
    ones = np.array([((bits >> bit) & 1).mean() for bit in range(24)])
    assert np.abs(ones - 0.5).max() < 5 * math.sqrt(0.25 / n)


def test_rows_and_elements_are_drawn_independently(uniform):
    centred = (uniform - 0.5) * math.sqrt(12)
    for axis, num in ((1, 1280), (0, 1024)):
        correlation = (centred @ centred.T if axis == 1 else centred.T @ centred) / num
        off_diagonal = correlation[~np.eye(len(correlation), dtype=bool)]
        assert np.abs(off_diagonal).max() < 6 / math.sqrt(num)
        assert off_diagonal.std() == pytest.approx(1 / math.sqrt(num), rel=0.02)


def test_steps_and_seeds_are_drawn_independently(uniform):
    for seed, step in ((0, 8), (1, 7), (2**31, 7)):
        other = keyed_uniform(row_keys(seed, tf.constant(step), tf.constant(0), 1024), 1280).numpy()
        correlation = np.corrcoef(uniform.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(uniform.size)


def mask(seed, step, first_row, num_rows, rate=0.2):
    with step_context(row_keys(seed, tf.constant(step, tf.int64), tf.constant(first_row), num_rows)):
        return KeyedDropout(rate)(tf.ones([num_rows, 300]), training=True).numpy()


def test_a_mask_depends_on_seed_step_and_global_row_alone():
    whole = mask(3, 11, 0, 64)
    np.testing.assert_array_equal(whole, np.concatenate([mask(3, 11, first, 16) for first in (0, 16, 32, 48)]))
    assert (whole != mask(3, 12, 0, 64)).any(1).all()
    assert (whole != mask(4, 11, 0, 64)).any(1).all()
    assert (whole[1:] != whole[:-1]).any(1).all()


@pytest.mark.parametrize('rate', [0.2, 0.5])
def test_dropout_zeroes_at_its_rate_and_scales_the_rest(rate):
    y = mask(0, 0, 0, 512, rate)
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-6)
    assert abs((y == 0).mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / y.size)


def test_dropout_draws_the_same_bits_with_xla():
    def masked(x, step, first_row):
        with step_context(row_keys(5, step, first_row, 32)):
            return KeyedDropout(0.2)(x, training=True)

    args = tf.ones([32, 200]), tf.constant(9, tf.int64), tf.constant(64)
    compiled = tf.function(masked, jit_compile=True)(*args)
    np.testing.assert_array_equal(compiled, masked(*args))
    np.testing.assert_array_equal(compiled, tf.function(masked)(*args))


def test_dropout_is_the_identity_in_inference_and_at_rate_zero():
    x = tf.ones([4, 10])
    assert KeyedDropout(0.5)(x, training=False) is x
    np.testing.assert_array_equal(KeyedDropout(0.0)(x, training=True), x)


def test_dropout_outside_of_a_step_differs_from_call_to_call():
    layer, x = KeyedDropout(0.5), tf.ones([4, 100])
    assert (layer(x, training=True).numpy() != layer(x, training=True).numpy()).any()


@pytest.mark.parametrize('rate', [-0.1, 1.0, float('nan'), '0.2'])
def test_a_rate_that_does_not_exist_is_refused(rate):
    with pytest.raises(ValueError, match='dropout is'):
        KeyedDropout(rate)


@pytest.mark.parametrize('jit', [False, True])
@pytest.mark.parametrize(('size', 'height', 'width'), [(3, 2, 2), (3, 1, 1), (3, 2, 1), (5, 2, 2), (5, 4, 3),
                                                       (7, 2, 1)])
def test_depthwise_on_maps_smaller_than_the_kernel_has_the_gradient_of_tensorflow(size, height, width, jit):
    rng = np.random.default_rng(0)
    x, upstream = (tf.constant(rng.standard_normal((4, height, width, 6)), tf.float32) for _ in range(2))
    layer = DepthwiseConv(size)
    layer.build(x.shape)

    @tf.function(jit_compile=jit)
    def gradients(x, kernel, convolve):
        with tf.GradientTape() as tape:
            tape.watch((x, kernel))
            y = convolve(x, kernel)
        return y, *tape.gradient(y, (x, kernel), output_gradients=upstream)

    def ours(x, kernel):
        return layer.stateless_call([kernel], [], x)[0]

    def theirs(x, kernel):
        return tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], 'SAME')

    kernel = tf.convert_to_tensor(layer.kernel)
    for value, wanted in zip(gradients(x, kernel, ours), gradients(x, kernel, theirs)):
        assert value.shape == wanted.shape
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)
