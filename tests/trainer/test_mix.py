"""Mixup, CutMix and random erasing against timm's formulas and a plain simulation of its algorithms, in NumPy."""

import functools
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_loss import definition

from ghostnet.keyed import keyed_uniform, row_keys
from trainer.gradient import make_forward_backward
from trainer.mix import MIDDLES, beta_quantiles, erase, mix_pairs
from trainer.recipe import ConfigError, Train
from trainer.state import build_model_and_state

NUM_DRAWS = 4000
HEIGHT, WIDTH = 20, 31


def make_batch(rows=16, height=HEIGHT, width=WIDTH, classes=11):
    rng = np.random.default_rng(0)
    return {'image': tf.constant(rng.integers(0, 256, (rows, height, width, 3), np.uint8)),
            'label': tf.constant(rng.integers(0, classes, rows).astype(np.int32)), 'mask': tf.ones([rows])}


def partner(rows):
    return np.reshape([[i + 1, i] for i in range(0, len(rows), 2)], -1)


def distance(samples, others):
    """Kolmogorov and Smirnov's between two samples, in units of what 0.1 % of pairs of equal distributions exceed."""
    points = np.concatenate([samples, others])
    shares = [np.searchsorted(np.sort(x), points, 'right') / len(x) for x in (samples, others)]
    return np.abs(shares[0] - shares[1]).max() / (1.95 * np.sqrt(1 / len(samples) + 1 / len(others)))


# The table of Beta(alpha, alpha)

def test_quantiles_that_have_a_closed_form():
    np.testing.assert_allclose(beta_quantiles(1.0), MIDDLES, atol=1e-5)
    np.testing.assert_allclose(beta_quantiles(0.5), np.sin(np.pi * MIDDLES / 2) ** 2, atol=1e-5)
    x = beta_quantiles(2.0)
    np.testing.assert_allclose(3 * x**2 - 2 * x**3, MIDDLES, atol=1e-5)


@pytest.mark.parametrize('alpha', [0.01, 0.1, 0.2, 0.4, 0.8, 1, 1.5, 2, 8, 1000])
def test_quantiles_are_those_of_numpys_generator(alpha):
    table, samples = beta_quantiles(alpha), np.random.default_rng(0).beta(alpha, alpha, 100_000)
    assert (np.diff(table) >= 0).all() and table[0] >= 0 and table[-1] <= 1
    np.testing.assert_allclose(table + table[::-1], 1, atol=1e-12)
    # The quantiles stand at the middles of steps of 1 / 4096. Below 1e-300 and above 1 - 1e-16 samples are tied.
    inside = (table > 1e-300) & (table < 1 - 1e-12)
    shares = np.searchsorted(np.sort(samples), table[inside]) / len(samples)
    assert np.abs(shares - MIDDLES[inside]).max() < 1.95 / np.sqrt(len(samples)) + 1 / 4096


# Mixup and CutMix

@functools.cache
def draw_steps(mixup_alpha, cutmix_alpha):
    """[NUM_DRAWS, H, W] and [NUM_DRAWS]: the partner's share in each pixel and as it is said; whether it is a box."""
    images = tf.constant([255, 0], tf.uint8)[:, None, None, None] * tf.ones([1, HEIGHT, WIDTH, 3], tf.uint8)
    batch = {'image': images, 'label': tf.constant([3, 4]), 'mask': tf.ones([2])}

    def draw(step):
        pixels, _, share = mix_pairs(batch, row_keys(0, step, -2, 1), mixup_alpha, cutmix_alpha)
        return 255 - pixels[0, ..., 0], share[0]

    taken, shares = tf.function(lambda: tf.map_fn(draw, tf.range(NUM_DRAWS), fn_output_signature=(tf.float32,) * 2),
                                jit_compile=True)()
    return taken.numpy() / 255, shares.numpy(), np.isin(taken, (0, 255)).all((1, 2))


@pytest.mark.parametrize('alpha', [0.2, 1.0])
def test_mixup_is_timms(alpha):
    """timm: x * lam + x.flip(0) * (1 - lam), and so are targets; here without any rounding."""
    batch, shares = make_batch(), []
    for step in range(20):
        pixels, labels, share = mix_pairs(batch, row_keys(0, step, -2, 1), alpha, None)
        assert (pixels.dtype, share.dtype, share.shape) == (tf.float32, tf.float32, [16])
        lam, images = 1 - np.float64(share[0]), np.float64(batch['image'])
        np.testing.assert_array_equal(pixels, images * lam + images[partner(images)] * (1 - lam))
        np.testing.assert_array_equal(labels, batch['label'].numpy()[partner(images)])
        assert np.ptp(share) == 0
        shares.append(float(share[0]))
    assert len(set(shares)) > 10


def test_cutmix_is_timms():
    """timm's box for the numbers that are drawn here, sides int(length * sqrt(1 - lam)), its border, its lambda."""
    batch = make_batch(4)
    images, areas = batch['image'].numpy(), []
    for step in range(100):
        key = row_keys(0, step, -2, 1)
        _, quantile, *centre = np.float64(keyed_uniform(key, 4)[0])
        lam = 1 - beta_quantiles(1.0)[int(quantile * 4096)]
        expected = images.copy()
        (yl, yh), (xl, xh) = (
            (np.clip(c - cut // 2, 0, length), np.clip(c + (cut + 1) // 2, 0, length))
            for c, cut, length in ((int(u * length), int(length * np.sqrt(1 - lam)), length)
                                   for u, length in zip(centre, (HEIGHT, WIDTH))))
        expected[:, yl:yh, xl:xh] = images[partner(images)][:, yl:yh, xl:xh]
        pixels, labels, share = mix_pairs(batch, key, None, 1.0)
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(labels, batch['label'].numpy()[partner(images)])
        np.testing.assert_allclose(share, [(yh - yl) * (xh - xl) / (HEIGHT * WIDTH)] * 4, rtol=1e-6)
        areas.append((yh - yl) * (xh - xl))
    assert min(areas) < 30 and max(areas) > 400


@pytest.mark.parametrize('alpha', [0.2, 1.0])
def test_boxes_are_distributed_as_timms(alpha):
    taken, shares, is_box = draw_steps(None, alpha)
    assert is_box.all()
    np.testing.assert_allclose(shares, taken.mean((1, 2)), rtol=1e-5)
    rng, n = np.random.default_rng(1), 100_000
    lam = rng.beta(alpha, alpha, n)
    spans = []
    for length in (HEIGHT, WIDTH):
        cut, centre = np.int64(length * np.sqrt(1 - lam)), rng.integers(0, length, n)
        spans.append((np.clip(centre - cut // 2, 0, length), np.clip(centre + (cut + 1) // 2, 0, length)))
    lengths = [high - low for low, high in spans]
    rows, columns = taken.any(2), taken.any(1)
    assert distance(np.round(shares * HEIGHT * WIDTH), lengths[0] * lengths[1]) < 1
    has_area = lengths[0] * lengths[1] > 0
    for found, (low, high) in ((rows[shares > 0], spans[0]), (columns[shares > 0], spans[1])):
        assert distance(found.argmax(1), low[has_area]) < 1
        assert distance(found.sum(1), (high - low)[has_area]) < 1


def test_of_two_ways_each_is_taken_in_half_of_the_steps():
    _, shares, is_box = draw_steps(0.2, 1.0)
    is_box &= (shares > 1e-4) & (shares < 1 - 1e-4)  # of others it cannot be told
    mixed = shares[~is_box & (shares > 1e-4) & (shares < 1 - 1e-4)]
    lam = np.random.default_rng(0).beta(0.2, 0.2, 100_000)
    assert distance(mixed, lam[(lam > 1e-4) & (lam < 1 - 1e-4)]) < 1
    both, only_mixup, only_cutmix = (draw_steps(*alphas)[2].mean() for alphas in ((1.0, 1.0), (1.0, None), (None, 1.0)))
    assert abs(both - 0.5) < 5 * np.sqrt(0.25 / NUM_DRAWS)
    assert (only_mixup < 1e-3, only_cutmix) == (True, 1)


def test_steps_are_drawn_independently():
    _, shares, is_box = draw_steps(1.0, 1.0)
    for a, b in ((shares[1:], shares[:-1]), (is_box[1:], is_box[:-1]), (shares[~is_box], np.flatnonzero(~is_box))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))


@pytest.mark.parametrize('alphas', [(1.0, None), (None, 1.0)])
def test_a_row_without_a_partner_stays_as_it_is(alphas):
    batch = make_batch(6)
    whole, _, shares = mix_pairs(batch, row_keys(0, 1, -2, 1), *alphas)
    masked, _, shares_masked = mix_pairs(batch | {'mask': tf.constant([1., 1, 1, 0, 0, 0])},
                                         row_keys(0, 1, -2, 1), *alphas)
    assert 0 < shares[0] < 1
    np.testing.assert_array_equal(masked[2], batch['image'][2])
    np.testing.assert_array_equal(shares_masked.numpy()[[2, 4, 5]], 0)
    np.testing.assert_array_equal(masked[:2], whole[:2])
    np.testing.assert_array_equal(shares_masked[:2], shares[:2])


@pytest.mark.parametrize('alphas', [(0.8, None), (None, 1.0)])
def test_the_loss_is_that_of_timms_targets_and_the_metrics_those_of_the_own_label(alphas):
    classes, smoothing, step_keys = 5, 0.1, row_keys(3, 2, -2, 2)
    batch = make_batch(16, classes=classes)
    model = keras.Sequential([keras.Input((HEIGHT, WIDTH, 3)), keras.layers.Flatten(), keras.layers.Dense(classes)])
    settings = Train(epochs=1, global_batch_size=16, model=lambda: model, optimizer=lambda: None,
                     schedule=lambda: None, label_smoothing=smoothing, mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    forward_backward = make_forward_backward(model, settings, lambda images: tf.cast(images, tf.float32) / 255, 1)
    params = {v.path: v.value for v in model.trainable_variables}
    _, _, sums = forward_backward(params, {}, {}, batch, row_keys(3, 2, 0, 16), step_keys)
    pixels, _, share = mix_pairs(batch, step_keys[:1], *alphas)
    logits, labels, lam = model(pixels / 255).numpy(), batch['label'].numpy(), 1 - float(share[0])
    assert 0.02 < lam < 0.98
    expected = lam * definition(logits, labels, smoothing) + (1 - lam) * definition(
        logits, labels[partner(labels)], smoothing)
    np.testing.assert_allclose(sums['loss'], expected.sum(), rtol=1e-5)
    assert (sums['examples'], sums['top1']) == (16, (logits.argmax(1) == labels).sum())


@pytest.mark.parametrize('way', ['mixup_alpha', 'cutmix_alpha'])
def test_rows_that_make_no_pairs_are_refused(way):
    settings = Train(epochs=1, global_batch_size=12, model=lambda: None, optimizer=lambda: None,
                     schedule=lambda: None, accumulate=2, **{way: 1.0})
    with pytest.raises(ConfigError, match=r'^train.global_batch_size is 12; it must be a multiple of the 2 replicas '
                                          r'times train.accumulate = 2 times 2, for pairs, as 8$'):
        build_model_and_state(settings, types.SimpleNamespace(num_replicas_in_sync=2), 5)


# Random erasing

CLEAN = 100.0  # no noise is that large


def simulate_erasing(rng, n, height, width, probability):
    """float [number of erased, 4]: height, width, top, left as timm's RandomErasing chooses them, row by row."""
    boxes = []
    for _ in range(n):
        if rng.random() > probability:
            continue
        for _ in range(10):
            area, aspect = rng.uniform(0.02, 1 / 3) * height * width, np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
            h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if w < width and h < height:
                boxes.append((h, w, rng.integers(0, height - h, endpoint=True),
                              rng.integers(0, width - w, endpoint=True)))
                break
    return np.array(boxes)


def erased(height, width, probability, num_rows=NUM_DRAWS):
    images = tf.fill([num_rows, height, width, 3], CLEAN)
    return tf.function(erase)(images, row_keys(0, 1, 0, num_rows), row_keys(0, 1, -1, 1), probability).numpy()


# An image of 3 x 60 pixels is too low for most rectangles: there all ten tries may fail.
@pytest.mark.parametrize(('height', 'width', 'probability'), [(24, 40, 0.25), (32, 32, 1.0), (3, 60, 1.0)])
def test_rectangles_are_distributed_as_timms(height, width, probability):
    is_noise = erased(height, width, probability) != CLEAN
    assert (is_noise == is_noise[..., :1]).all()
    is_noise = is_noise[..., 0]
    rows, columns = is_noise.any(2), is_noise.any(1)
    np.testing.assert_array_equal(is_noise, rows[:, :, None] & columns[:, None])
    is_erased = is_noise.any((1, 2))
    found = [x[is_erased] for x in (rows.sum(1), columns.sum(1), rows.argmax(1), columns.argmax(1))]
    for spans, start, size in ((rows, found[2], found[0]), (columns, found[3], found[1])):
        offset = np.arange(spans.shape[1]) - start[:, None]
        np.testing.assert_array_equal(spans[is_erased], (offset >= 0) & (offset < size[:, None]))
    expected = simulate_erasing(np.random.default_rng(0), 20_000, height, width, probability)
    rate = len(expected) / 20_000
    assert 0.1 < rate <= probability
    assert abs(is_erased.mean() - rate) <= 5 * np.sqrt(rate * (1 - rate) * (1 / NUM_DRAWS + 1 / 20_000))
    for ours, theirs in zip(found, expected.T):
        assert distance(ours, theirs) < 1
    for combine in (np.multiply, np.divide):
        assert distance(combine(*found[:2]), combine(*expected.T[:2])) < 1


def test_nothing_else_is_touched():
    images = tf.random.stateless_normal([64, 24, 40, 3], [1, 2])
    is_same = erase(images, row_keys(0, 1, 0, 64), row_keys(0, 1, -1, 1), 0.5).numpy() == images.numpy()
    assert 20 < is_same.all((1, 2, 3)).sum() < 44
    assert 0.4 < is_same.mean(where=~is_same.all((1, 2, 3), keepdims=True)) < 0.98


def test_noise_is_normal_and_of_its_own_in_each_pixel_channel_row_and_step():
    images, keys = tf.fill([64, 64, 64, 3], CLEAN), row_keys(0, 1, 0, 64)
    noise, other_step = (erase(images, keys, row_keys(0, step, -1, 1), 1.0).numpy() for step in (1, 2))
    values, size = noise[noise != CLEAN], 64 * 64 * 3  # so many are independent
    assert distance(values[:size], np.random.default_rng(0).standard_normal(100_000)) < 1
    assert abs(values.mean()) < 5 / np.sqrt(size) and abs(values.std() - 1) < 5 / np.sqrt(2 * size)

    def correlation(a, b):
        both = (a != CLEAN) & (b != CLEAN)
        assert both.sum() > 1000
        return np.abs(np.corrcoef(a[both], b[both])[0, 1]) * np.sqrt(min(both.sum(), size))

    assert correlation(noise[..., 0], noise[..., 1]) < 5
    assert correlation(noise[:, 1:], noise[:, :-1]) < 5
    assert correlation(noise[:, :, 1:], noise[:, :, :-1]) < 5
    assert correlation(noise[1:], noise[:-1]) < 5
    assert correlation(noise, other_step) < 5


# Neither replicas nor parts nor XLA

@pytest.mark.parametrize('jit', [False, True])
def test_rows_on_replicas_or_in_parts_are_those_of_the_whole_batch_bit_for_bit(jit):
    batch, is_cutmix = make_batch(16, 33, 28), set()

    @tf.function(jit_compile=jit)
    def prepare(batch, first_row, step):
        step_keys, keys = row_keys(7, step, -2, 2), row_keys(7, step, first_row, batch['image'].shape[0])
        pixels, labels, share = mix_pairs(batch, step_keys[:1], 0.4, 1.0)
        return pixels, labels, share, erase(pixels, keys, step_keys[1:], 0.7)

    for step in (0, 1, 2, 10**6):
        step = tf.constant(step, tf.int64)
        whole = prepare(batch, tf.constant(0), step)
        is_cutmix.add(bool((whole[0] == tf.round(whole[0])).numpy().all()))
        for ours, theirs in zip(whole, prepare.python_function(batch, tf.constant(0), step)):
            np.testing.assert_array_equal(ours, theirs)
        for num_rows in (8, 4):
            parts = [prepare({key: t[i:i + num_rows] for key, t in batch.items()}, tf.constant(i), step)
                     for i in range(0, 16, num_rows)]
            for ours, theirs in zip(whole, zip(*parts)):
                np.testing.assert_array_equal(ours, np.concatenate(theirs))
    assert is_cutmix == {False, True}
