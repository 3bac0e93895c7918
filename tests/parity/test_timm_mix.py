"""Mixup, CutMix and random erasing against timm's own, which is given the numbers that were drawn here.

PyTorch and TensorFlow stand in environments of their own: PARITY_PYTHON names an interpreter that has torch and timm.

    PARITY_PYTHON=/path/to/python pytest tests/parity
"""
import os
import subprocess

import numpy as np
import pytest
import tensorflow as tf

from ghostnet.keyed import keyed_uniform, mix_bits, row_keys
from trainer.loss import smoothed_cross_entropy
from trainer.mix import beta_quantiles, erase, mix_pairs

PYTHON = os.environ.get('PARITY_PYTHON')
pytestmark = pytest.mark.skipif(not PYTHON, reason='PARITY_PYTHON names no interpreter with torch (the extra `parity`)')
ALPHAS = ((0.2, None), (None, 1.0), (0.4, 1.0))
CLASSES, SMOOTHING, NUM_STEPS = 7, 0.1, 20
SHAPE = (8, 21, 30, 3)
NUM_ERASED = 500
# timm mixes row i with row -1 - i: in this order those are 2i and 2i + 1.
ORDER = [0, 2, 4, 6, 7, 5, 3, 1]
SCRIPT = """
import random, sys
import numpy as np
import timm.data.random_erasing
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy

with np.load(sys.argv[1]) as archive:
    arrays = dict(archive)
images, labels, logits, smoothing = (arrays[name] for name in ('images', 'labels', 'logits', 'smoothing'))
results = {'pixels': [], 'losses': []}
for alphas, (way, lam, y, x) in zip(arrays['alphas'], arrays['draws']):
    # What Mixup asks NumPy for, in its order: whether to mix, which way if there are two, lambda, the box's centre.
    uniforms, centre = iter([0.0, way]), iter([y, x])
    np.random.rand = lambda: next(uniforms)
    np.random.beta = lambda a, b: lam
    np.random.randint = lambda low, high, size=None: low + int(next(centre) * (high - low))
    mixup = Mixup(*alphas, prob=1.0, switch_prob=0.5, mode='batch', label_smoothing=float(smoothing),
                  num_classes=logits.shape[1])
    pixels, targets = mixup(torch.tensor(images).permute(0, 3, 1, 2).double(), torch.tensor(labels).long())
    results['pixels'].append(pixels.permute(0, 2, 3, 1).numpy())
    log_probabilities = torch.log_softmax(torch.tensor(logits).double(), -1)
    results['losses'].append((-targets.double() * log_probabilities).sum(-1).numpy())
    torch.testing.assert_close(SoftTargetCrossEntropy()(torch.tensor(logits).double(), targets.double()),
                               torch.tensor(results['losses'][-1]).mean())
results['masks'] = []
erasing = timm.data.random_erasing.RandomErasing(float(arrays['probability']), mode='const', device='cpu')
for uniforms in arrays['erasing']:
    uniforms = iter(uniforms)
    random.random = lambda: next(uniforms)
    random.uniform = lambda low, high: low + next(uniforms) * (high - low)
    random.randint = lambda low, high: low + int(next(uniforms) * (high - low + 1))
    results['masks'].append(erasing(torch.ones(3, *images.shape[1:3])).numpy()[0] == 0)
np.savez(sys.argv[2], **results)
"""


def middles(uniform):
    """Of the steps of the tables that the numbers fall in."""
    return (np.floor(uniform * 4096) + 0.5) / 4096


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    return {'image': rng.integers(0, 256, SHAPE, np.uint8),
            'label': rng.integers(0, CLASSES, SHAPE[0]).astype(np.int32),
            'logits': rng.normal(0, 3, (SHAPE[0], CLASSES)).astype(np.float32), 'mask': np.ones(SHAPE[0], np.float32)}


@pytest.fixture(scope='module')
def theirs(batch, tmp_path_factory):
    directory, draws = tmp_path_factory.mktemp('timm_mix'), []
    for mixup_alpha, cutmix_alpha in ALPHAS:
        for step in range(NUM_STEPS):
            way, quantile, y, x = np.float64(keyed_uniform(row_keys(0, step, -2, 1), 4)[0])
            is_cutmix = mixup_alpha is None or cutmix_alpha is not None and way < 0.5
            share = beta_quantiles(cutmix_alpha if is_cutmix else mixup_alpha)[int(quantile * 4096)]
            draws.append((way, 1 - share, y, x))
    # Each row asks whether it is erased, then for area, aspect and, where that fits, the corner.
    uniforms = np.float64(keyed_uniform(mix_bits(row_keys(0, 1, 0, NUM_ERASED) + tf.constant(1, tf.uint32)), 50))
    asked = []
    for row in uniforms.reshape(-1, 10, 5):
        numbers = [row[0, 4]]
        for area, aspect, top, left, _ in row:
            area, aspect = middles(area), 1 - middles(aspect)
            numbers += [area, aspect]
            pixels, ratio = (0.02 + (1 / 3 - 0.02) * area) * SHAPE[1] * SHAPE[2], 0.3 ** (1 - 2 * aspect)
            if round(np.sqrt(pixels / ratio)) < SHAPE[2] and round(np.sqrt(pixels * ratio)) < SHAPE[1]:
                numbers += [top, left]
        asked.append(numbers + [0.0] * (50 - len(numbers)))
    np.savez(directory / 'in.npz', images=batch['image'][ORDER], labels=batch['label'][ORDER],
             logits=batch['logits'][ORDER], smoothing=SMOOTHING, draws=draws, erasing=asked, probability=0.6,
             alphas=np.repeat([[alpha or 0.0 for alpha in alphas] for alphas in ALPHAS], NUM_STEPS, axis=0))
    run = subprocess.run([PYTHON, '-c', SCRIPT, directory / 'in.npz', directory / 'out.npz'], capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    with np.load(directory / 'out.npz') as archive:
        return dict(archive)


@pytest.mark.parametrize('case', range(len(ALPHAS)))
def test_pixels_and_losses_are_timms(batch, theirs, case):
    """Lambda is rounded to 16 bits here."""
    num_mixed, logits = 0, tf.constant(batch['logits'])
    for step in range(NUM_STEPS):
        pixels, labels, share = mix_pairs(batch, row_keys(0, step, -2, 1), *ALPHAS[case])
        losses, others = (smoothed_cross_entropy(logits, tf.constant(x), SMOOTHING) for x in (batch['label'], labels))
        expected = theirs['pixels'][case * NUM_STEPS + step]
        np.testing.assert_allclose(pixels.numpy()[ORDER], expected, atol=255 * 2**-17 + 1e-9)
        np.testing.assert_allclose((losses + share * (others - losses)).numpy()[ORDER],
                                   theirs['losses'][case * NUM_STEPS + step], rtol=2e-5)
        num_mixed += (pixels != batch['image']).numpy().any()
    assert num_mixed > NUM_STEPS / 2


def test_rectangles_are_timms(theirs):
    clean = tf.fill([NUM_ERASED, *SHAPE[1:]], 100.0)
    is_noise = erase(clean, row_keys(0, 1, 0, NUM_ERASED), row_keys(0, 1, -1, 1), 0.6).numpy() != 100
    assert abs(is_noise.any((1, 2, 3)).mean() - 0.6) < 0.1
    np.testing.assert_array_equal(is_noise, np.repeat(theirs['masks'][..., np.newaxis], 3, axis=-1))
