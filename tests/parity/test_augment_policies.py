"""What the augmentations draw from, against timm and torchvision: policies, ranges, PIL's calls; all but the chances.

PARITY_PYTHON names an interpreter that has torch, timm and torchvision (the extra `parity`):

    PARITY_PYTHON=/path/to/python pytest tests/parity
"""
import json
import os
import subprocess

import numpy as np
import pytest

from input_pipeline import augment

PYTHON = os.environ.get('PARITY_PYTHON')
pytestmark = pytest.mark.skipif(not PYTHON, reason='PARITY_PYTHON names no interpreter with timm (the extra `parity`)')
LEVELS = (2.5, 5.0, 7.31, 9.0, 10.0)  # below 2.5 timm asks for no bits, which Pillow refuses
# timm's own operations at each level: each argument as it is, and negated, is one `way` of ours.
SCRIPT = """
import json, random, sys
import numpy as np
import torchvision
from PIL import Image
from timm.data import auto_augment

levels, image = json.loads(sys.argv[2]), np.load(sys.argv[1])['image']
rand = auto_augment.rand_augment_transform('rand-m9-mstd0.5', {'img_mean': (124, 116, 104)})
original = auto_augment.auto_augment_transform('original', {'img_mean': (124, 116, 104)})
about = {'rand': [[op.name, op.prob, op.magnitude, op.magnitude_std] for op in rand.ops], 'layers': rand.num_layers,
         'original': [[[op.name, op.prob, op.magnitude] for op in pair] for pair in original.policy],
         'noise': [op.magnitude_std for pair in original.policy for op in pair],
         'torchvision': torchvision.transforms.AutoAugment(torchvision.transforms.AutoAugmentPolicy.IMAGENET).policies}
arrays = {}
names = {op.name: op for op in rand.ops} | {op.name: op for pair in original.policy for op in pair}
for name, op in names.items():
    for level in levels:
        for sign, draw in (('+', 0.1), ('-', 0.9)):  # timm negates at random() > 0.5
            random.random = lambda: draw
            for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
                op.prob, op.magnitude, op.magnitude_std, op.kwargs['resample'] = 1.0, level, 0, resample
                key = f'{name} {level} {sign} {resample.name}'
                arrays[key] = np.asarray(op(Image.fromarray(image)))
jitter = torchvision.transforms.ColorJitter(0.4, 0.4, 0.4)
about['jitter'] = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]
np.savez(sys.argv[3], about=json.dumps(about), **arrays)
"""


@pytest.fixture(scope='module')
def image():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (1, 12, 14, 3)).repeat(16, axis=1).repeat(16, axis=2)[0]
    return np.uint8(np.clip(coarse * 0.8 + rng.normal(20, 5, coarse.shape), 0, 255))


@pytest.fixture(scope='module')
def theirs(image, tmp_path_factory):
    directory = tmp_path_factory.mktemp('augment')
    np.savez(directory / 'in.npz', image=image)
    run = subprocess.run([PYTHON, '-c', SCRIPT, directory / 'in.npz', json.dumps(LEVELS), directory / 'out.npz'],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with np.load(directory / 'out.npz') as archive:
        arrays = dict(archive)
    return json.loads(str(arrays.pop('about'))), arrays


@pytest.fixture
def drawn(monkeypatch):
    """drawn(augmentation): the names that it applies to one of 5,000 images or another."""
    def draw(change):
        names = set()
        monkeypatch.setattr(augment, 'apply', lambda name, image, level, way: names.add(name))
        rng = np.random.default_rng(0)
        for _ in range(5000):
            change(None, rng)
        return names

    return draw


def test_rand_augment_is_that_of_timm(theirs, drawn):
    about, _ = theirs
    assert {tuple(op[1:]) for op in about['rand']} == {(0.5, 9, 0.5)} and about['layers'] == 2
    assert drawn(augment.make_rand_augment()) == {op[0] for op in about['rand']} and len(about['rand']) == 15


def test_the_policy_is_that_of_timm_and_torchvision(theirs):
    about, _ = theirs
    assert [[list(step) for step in pair] for pair in augment._POLICY] == about['original']
    assert set(about['noise']) == {0}
    # torchvision leaves out levels that mean nothing, and has its own names.
    for ours, pair in zip(augment._POLICY, about['torchvision'], strict=True):
        for (name, probability, level), (other_name, other_probability, other_level) in zip(ours, pair, strict=True):
            assert (name.removesuffix('Original'), probability) == (other_name, other_probability)
            assert other_level in (None, level)


def test_each_operation_is_that_of_timm(theirs, image):
    names = {key.split()[0] for key in theirs[1]}
    assert len(names) == 16
    for key, wanted in theirs[1].items():
        name, level, sign, interpolation = key.split()
        ours = augment.apply(name, image, float(level), (0.2 if sign == '+' else 0.7,
                                                         0.2 if interpolation == 'BILINEAR' else 0.7))
        difference = np.abs(ours.astype(int) - wanted)
        if name in ('Rotate', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel'):  # see test_augment.py
            assert difference.mean() <= (1.0 if interpolation == 'BILINEAR' else 2.0), key
        else:
            assert difference.max() <= (name in ('Brightness', 'Contrast', 'Color', 'Sharpness')), key


def test_color_jitter_has_the_ranges_of_torchvision(theirs, monkeypatch):
    low, high = 1 - 0.4, 1 + 0.4
    assert theirs[0]['jitter'] == [[low, high]] * 3 + [None]
    factors, rng = [], np.random.default_rng(0)
    monkeypatch.setattr(augment, 'apply', lambda name, image, level, way: factors.append(0.1 + 0.18 * level))
    for _ in range(1000):
        augment.make_color_jitter()(None, rng)
    assert low <= min(factors) < low + 0.01 and high - 0.01 < max(factors) <= high
