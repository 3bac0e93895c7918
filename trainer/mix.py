"""Mixup, CutMix and random erasing on the device, with choices from tables, so that XLA changes no bit: pure maths."""
import statistics

import numpy as np
import tensorflow as tf

from ghostnet.keyed import keyed_uniform, mix_bits

MIDDLES = (np.arange(4096) + 0.5) / 4096  # of equal parts of [0, 1], of which a table holds the quantiles


def beta_quantiles(alpha: float) -> np.ndarray:
    """float64 [4096]: the quantiles of Beta(alpha, alpha) at MIDDLES; alpha > 0."""
    # Up to 1/2; the rest mirrors it. Over v = (2 * x) ** min(alpha, 1) the density has no pole at 0.
    v, exponent = np.linspace(0, 1, 2**17), max(1 / alpha, 1)
    mass = np.cumsum(((2 - v ** exponent) * (v if alpha > 1 else 1)) ** (alpha - 1))
    half = np.interp(2 * MIDDLES[:2048], mass / mass[-1], v) ** exponent / 2
    return np.concatenate([half, 1 - half[::-1]])


def _look_up(table, uniform):
    return tf.gather(tf.constant(table, tf.float32), tf.cast(uniform * len(table), tf.int32))


def _is_inside(start, size, shape):  # bool [..., H, W], of rectangles: start and size are whole numbers [..., 2]
    rows, columns = (tf.abs(np.arange(n) + 0.5 - (start + size / 2)[..., i:i + 1]) < size[..., i:i + 1] / 2
                     for i, n in enumerate(shape))
    return rows[..., tf.newaxis] & columns[..., tf.newaxis, :]


def mix_pairs(batch: dict[str, tf.Tensor], step_key: tf.Tensor, mixup_alpha: float | None,
              cutmix_alpha: float | None) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Mixes rows 2i and 2i + 1: (float32 pixels in 0..255, the partners' labels, the partners' share, float32 [B]).

    As timm's Mixup in mode 'batch': one way and one lambda ~ Beta(alpha, alpha) for all rows of a step; of two alphas
    each has probability 1/2. The share is 1 - lambda, in 16 bits, which float32 multiplies by bytes without rounding;
    for CutMix it is what the border leaves of the box; 0 where the partner's 'mask' is. step_key: uint32 [1].
    Sources: Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019.
    """
    num_rows, *shape, _ = batch['image'].shape
    draws, partner = keyed_uniform(step_key, 4)[0], np.arange(num_rows) ^ 1
    is_cutmix = draws[0] < (0.5 if mixup_alpha and cutmix_alpha else float(mixup_alpha is None))
    share = _look_up(np.round(beta_quantiles(mixup_alpha or cutmix_alpha) * 2**16) / 2**16, draws[1])
    size = _look_up(np.floor(np.sqrt(beta_quantiles(cutmix_alpha or mixup_alpha))[:, np.newaxis] * shape), draws[1])
    box = tf.cast(_is_inside(tf.floor(draws[2:] * shape) - size // 2, size, shape), tf.float32)
    has_partner = tf.gather(batch['mask'], partner)
    weight = tf.where(is_cutmix, box, share)[..., tf.newaxis] * has_partner[:, tf.newaxis, tf.newaxis, tf.newaxis]
    share = tf.where(is_cutmix, tf.reduce_sum(box) * (1 / np.prod(shape)), share) * has_partner
    images, others = (tf.cast(t, tf.float32) for t in (batch['image'], tf.gather(batch['image'], partner)))
    return images + weight * (others - images), tf.gather(batch['label'], partner), share


def erase(images: tf.Tensor, keys: tf.Tensor, step_key: tf.Tensor, probability: float) -> tf.Tensor:
    """Fills a rectangle in some of the normalised images, float32 [B, H, W, C], with standard normal noise.

    As timm's RandomErasing in mode 'pixel': 0.02 to 1/3 of the area, height by width log-uniform from 0.3 to 1/0.3, the
    first of ten tries that is smaller than the image. keys: uint32 [B], of the rows; step_key: uint32 [1]. The noise of
    a row is that of the step, moved by lines. Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020.
    """
    _, *shape, channels = images.shape
    draws = tf.reshape(keyed_uniform(mix_bits(keys + tf.constant(1, tf.uint32)), 50), [-1, 10, 5])  # not dropout's
    side = _look_up(np.sqrt((0.02 + (1 / 3 - 0.02) * MIDDLES) * np.prod(shape)), draws[..., :1])
    size = tf.round(side * _look_up(0.3 ** ((MIDDLES[:, np.newaxis] - 0.5) * [1, -1]), draws[..., 1]))
    start = tf.floor(draws[..., 2:4] * (shape - size + 1))
    fits = tf.reduce_all(size < shape, axis=-1) & (draws[:, :1, 4] < probability)
    chosen = tf.reduce_min(tf.where(fits, tf.range(10), 10), axis=1)  # 10: none, of size 0
    start, size = (tf.gather(tf.pad(t, [[0, 0], [0, 1], [0, 0]]), chosen, batch_dims=1) for t in (start, size))
    noise = _look_up([statistics.NormalDist().inv_cdf(p) for p in MIDDLES],
                     tf.reshape(keyed_uniform(step_key, np.prod(shape) * channels), [*shape, channels]))
    lines = (tf.cast(draws[:, 1, 4:] * shape[0], tf.int32) + tf.range(shape[0])) % shape[0]
    return tf.where(_is_inside(start, size, shape)[..., tf.newaxis], tf.gather(noise, lines), images)
