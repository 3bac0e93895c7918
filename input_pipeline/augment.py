"""Random changes of colour and geometry on the host: PIL's operations by OpenCV, which is several times as fast.

An augmentation is `augment(image, rng) -> image`, both uint8 [H, W, 3], with the example's own generator; it leaves
what it is given as it is. Colours are PIL's within one grey level, where floats round otherwise. Geometry rounds where
PIL cuts off, blends with the fill at the image's edge, and its bicubic kernel has a slope of -0.75 (PIL: -1).
"""
from collections.abc import Callable, Iterable, Sequence

import cv2
import numpy as np


def make_rand_augment(magnitude: float = 9, magnitude_std: float = 0.5, num_layers: int = 2) -> Callable:
    """RandAugment (Cubuk et al., 2020) as timm's rand-m9-mstd0.5: any of 15 operations, each by a chance of 0.5."""
    if not (0 <= magnitude <= 10 and 0 <= magnitude_std < np.inf and num_layers in range(1, 100)):
        raise ValueError(f'rand_augment: magnitude ({magnitude}) must be in 0..10, magnitude_std ({magnitude_std}) at '
                         f'least 0, and num_layers ({num_layers}) an integer from 1')
    names = [name for name in (*_TABLES, *_BY_HISTOGRAM, *_ENHANCE, *_AFFINE) if name != 'PosterizeOriginal']
    return _make(lambda rng: [(names[int(rng.random() * 15)], 0.5,
                               min(max(rng.normal(magnitude, magnitude_std), 0), 10)) for _ in range(num_layers)])


def make_auto_augment() -> Callable:
    """AutoAugment's ImageNet policy (Cubuk et al., 2019) in tenths of the paper's ranges, as timm's original."""
    return _make(lambda rng: _POLICY[int(rng.random() * len(_POLICY))])


def make_color_jitter(brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4) -> Callable:
    """torchvision's ColorJitter: all three in random order, by factors uniform in [max(0, 1 - x), 1 + x]."""
    if not all(0 <= x < np.inf for x in (brightness, contrast, saturation)):
        raise ValueError(f'color_jitter: {(brightness, contrast, saturation)} must be numbers, at least 0')
    ranges = [(name, max(0.0, 1 - x), 1 + x) for name, x in zip(_ENHANCE, (brightness, contrast, saturation))]
    return _make(lambda rng: [(name, 1.0, (rng.uniform(low, high) - 0.1) / 0.18)  # the level that has this factor
                              for name, low, high in (ranges[i] for i in rng.random(3).argsort())])


def _make(choose: Callable[[np.random.Generator], Iterable[tuple[str, float, float]]]) -> Callable:
    """An augmentation: `choose(rng)` says which operations, with what probability, at which level."""
    def augment(image, rng):
        for name, probability, level in choose(rng):
            chance, *way = rng.random(3).tolist()
            image = apply(name, image, level, way) if chance < probability else image
        return image

    return augment


def apply(name: str, image: np.ndarray, level: float, way: Sequence[float]) -> np.ndarray:
    """One operation at a level of 0..10; `way`, two numbers in [0, 1): direction and interpolation of geometry."""
    amount = level / 10
    if name in _TABLES:
        return cv2.LUT(image, _TABLES[name](amount).clip(0, 255).astype(np.uint8))
    if name in _BY_HISTOGRAM:
        return cv2.merge([_stretch(channel, name) for channel in cv2.split(image)])
    if name in _ENHANCE:
        return _enhance(image, name, 0.1 + 1.8 * amount)
    height, width = image.shape[:2]
    matrix = np.array(_AFFINE[name](amount if way[0] < 0.5 else -amount, width, height), np.float64)
    matrix[:, 2] += matrix[:, :2].sum(axis=1) / 2 - 0.5  # PIL counts from a pixel's corner, OpenCV from its centre
    flags = cv2.WARP_INVERSE_MAP | (cv2.INTER_LINEAR if way[1] < 0.5 else cv2.INTER_CUBIC)
    return cv2.warpAffine(image, matrix, (width, height), flags=flags, borderValue=(124, 116, 104))  # ImageNet's mean


def _stretch(channel: np.ndarray, name: str) -> np.ndarray:
    counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel()
    low, high = counts.nonzero()[0][[0, -1]]
    step = (counts.sum() - counts[high]) // 255 if name == 'Equalize' else high - low
    if step == 0:
        return channel
    table = ((counts.cumsum() - counts + step // 2) // step if name == 'Equalize' else
             _RAMP * (255 / step) - low * (255 / step))
    return cv2.LUT(channel, table.clip(0, 255).astype(np.uint8))


def _enhance(image: np.ndarray, name: str, factor: float) -> np.ndarray:
    grey, start = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.zeros_like(image)
    if name == 'Contrast':
        start[:] = int(cv2.mean(grey)[0] + 0.5)
    elif name == 'Color':
        start = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    elif name == 'Sharpness':
        start = image.copy()  # whose outermost pixels PIL does not smooth
        start[1:-1, 1:-1] = cv2.filter2D(image, -1, np.float32([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13)[1:-1, 1:-1]
    return cv2.addWeighted(image, factor, start, 1 - factor, -0.4999)  # it rounds, PIL cuts off


_RAMP = np.arange(256)
_BY_HISTOGRAM, _ENHANCE = ('AutoContrast', 'Equalize'), ('Brightness', 'Contrast', 'Color', 'Sharpness')
_TABLES = {  # amount in 0..1 -> what becomes of each grey level
    'Invert': lambda amount: 255 - _RAMP,
    'Posterize': lambda amount: _RAMP & -(2 ** (8 - int(4 * amount))),
    'PosterizeOriginal': lambda amount: _RAMP & -(2 ** (4 - int(4 * amount))),
    'Solarize': lambda amount: np.where(_RAMP < int(256 * amount), _RAMP, 255 - _RAMP),
    'SolarizeAdd': lambda amount: _RAMP + int(110 * amount) * (_RAMP < 128)}
_AFFINE = {  # (amount in -1..1, width, height) -> where a pixel comes from, in PIL's coordinates
    'Rotate': lambda amount, width, height: cv2.getRotationMatrix2D((width / 2, height / 2), -30 * amount, 1),
    'ShearX': lambda amount, *_: ((1, 0.3 * amount, 0), (0, 1, 0)),
    'ShearY': lambda amount, *_: ((1, 0, 0), (0.3 * amount, 1, 0)),
    'TranslateXRel': lambda amount, width, _: ((1, 0, 0.45 * amount * width), (0, 1, 0)),
    'TranslateYRel': lambda amount, _, height: ((1, 0, 0), (0, 1, 0.45 * amount * height))}
_POLICY = [[(name, float(p), float(level)) for name, p, level in map(str.split, pair.split(', '))] for pair in (
    'PosterizeOriginal 0.4 8, Rotate 0.6 9; Solarize 0.6 5, AutoContrast 0.6 5; Equalize 0.8 8, Equalize 0.6 3; '
    'PosterizeOriginal 0.6 7, PosterizeOriginal 0.6 6; Equalize 0.4 7, Solarize 0.2 4; Equalize 0.4 4, Rotate 0.8 8; '
    'Solarize 0.6 3, Equalize 0.6 7; PosterizeOriginal 0.8 5, Equalize 1.0 2; Rotate 0.2 3, Solarize 0.6 8; '
    'Equalize 0.6 8, PosterizeOriginal 0.4 6; Rotate 0.8 8, Color 0.4 0; Rotate 0.4 9, Equalize 0.6 2; '
    'Equalize 0.0 7, Equalize 0.8 8; Invert 0.6 4, Equalize 1.0 8; Color 0.6 4, Contrast 1.0 8; '
    'Rotate 0.8 8, Color 1.0 2; Color 0.8 8, Solarize 0.8 7; Sharpness 0.4 7, Invert 0.6 8; '
    'ShearX 0.6 5, Equalize 1.0 9; Color 0.4 0, Equalize 0.6 3; Equalize 0.4 7, Solarize 0.2 4; '
    'Solarize 0.6 5, AutoContrast 0.6 5; Invert 0.6 4, Equalize 1.0 8; Color 0.6 4, Contrast 1.0 8; '
    'Equalize 0.8 8, Equalize 0.6 3').split('; ')]
