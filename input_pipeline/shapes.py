"""The embedded data set: 6,000 drawn JPEGs of ten shapes as a TFDS builder; needs neither network nor files.

An image is a textured ground, clutter, one large figure of the labelled shape (textured, rotated, squeezed, anywhere in
the central square), clutter over it, and grain. Nothing but the outline depends on the class. The same bytes on every
machine and run: every choice is an integer from Philox, a generator that its definition fixes; every pixel is NumPy
integer arithmetic; `encode` says what the JPEG's bytes rest on.
"""
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

NUM_EXAMPLES = {'train': 5000, 'test': 1000}
_LUMA = np.array([5, 9, 2], np.int16)  # of red, green and blue, in sixteenths
UNIT = 1024
_COS_SIN_72 = ((1024, 0), (316, 974), (-828, 602), (-828, -602), (316, -974))  # of multiples of 72 degrees, times UNIT


def _disc(u: np.ndarray, v: np.ndarray, radius: int = 860) -> np.ndarray:
    return u * u + v * v <= radius * radius


# Coordinates u, v (int32 [h, w]) -> bool [h, w], inside or not. Each lies within the circle of radius UNIT around the
# origin, and all stay apart under rotation, flip and a stretch of 4 to 3.
Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]
SHAPES: dict[str, Shape] = {
    'disc': _disc,
    'ring': lambda u, v: _disc(u, v, 920) & ~_disc(u, v, 500),
    'square': lambda u, v: np.maximum(abs(u), abs(v)) <= 700,
    'triangle': lambda u, v: np.maximum(UNIT * u, 887 * abs(v) - 512 * u) <= 510 * UNIT,  # sides 120 degrees apart
    # A pentagram: within at least four of the five half-planes that bound its inner pentagon.
    'star': lambda u, v: sum((a * u + b * v <= 315 * UNIT).astype(np.int8) for a, b in _COS_SIN_72) >= 4,
    'cross': lambda u, v: (np.minimum(abs(u), abs(v)) <= 250) & (np.maximum(abs(u), abs(v)) <= 950),
    'crescent': lambda u, v: _disc(u, v, 960) & ~_disc(u - 480, v, 760),
    # Two discs that touch, and the kite between that point and the tip, where their outer tangents meet.
    'heart': lambda u, v: (_disc(abs(u) - 440, v + 350, 440)
                           | (3 * (v + 350) >= abs(u)) & (4 * abs(u) + 3 * (v + 350) <= 9 * 440)),
    'arrow': lambda u, v: (abs(v) <= np.where(u >= 0, np.minimum(980 - u, 760), 230)) & (u >= -960),
    'hourglass': lambda u, v: (abs(u) <= 720) & (5 * abs(v) <= 4 * abs(u) + 250),
}
# A bar and a disc; the least and the greatest UNIT, in quarter pixels for every 100 pixels of the shorter side.
_CLUTTER = (lambda u, v: (abs(v) <= 110) & (abs(u) <= 1000), 25, 55), (_disc, 8, 26)


def draw(split: str, index: int) -> tuple[np.ndarray, int]:
    """Record `index` of a split: uint8 [H, W, 3], shorter side 80..128, longer up to 4/3 of it; label `index` % 10."""
    bits = np.random.Philox(key=(['train', 'test'].index(split) << 64) + index)
    label = index % len(SHAPES)
    short = _between(bits, 80, 128)
    long = short * _between(bits, 96, 128) // 96
    height, width = (short, long) if _between(bits, 0, 1) else (long, short)

    ground, figure = _two_colours(bits), _two_colours(bits)
    while abs(_LUMA @ (figure[0] - ground[0])) < 80 * 16:
        figure = _two_colours(bits)
    canvas = _mix(ground, _pattern(bits, height, width))
    _add_clutter(bits, canvas, _between(bits, 2, 5))
    radius = short * _between(bits, 115, 180) // 100  # in quarter pixels, so 57 to 90 % of the shorter side across
    slack = 2 * short - radius
    centre = 2 * height + _between(bits, -slack, slack), 2 * width + _between(bits, -slack, slack)
    _stamp(bits, canvas, list(SHAPES.values())[label], figure, centre, radius, squeeze=_between(bits, 13, 16))
    _add_clutter(bits, canvas, _between(bits, 0, 2))
    shift = _between(bits, 4, 6)
    grain = bits.random_raw(height * width // 8 + 1).astype('<u8').view(np.uint8)[:height * width]
    canvas += (grain.reshape(height, width, 1) >> shift).astype(np.int16) - (128 >> shift)
    return np.clip(canvas, 0, 255).astype(np.uint8), label


def _between(bits: np.random.Philox, low: int, high: int) -> int:
    """A random integer in [low, high]."""
    return low + (int(bits.random_raw()) * (high - low + 1) >> 64)


def _rotation(bits: np.random.Philox) -> tuple[int, int, int]:
    """A random angle as (a, b, h): its cosine is a / h and its sine b / h, exactly, since a**2 + b**2 == h**2."""
    t = _between(bits, -424, 424)  # 1024 times the tangent of half the angle: 45 degrees either way
    a, b, h = 1024 * 1024 - t * t, 2 * 1024 * t, 1024 * 1024 + t * t
    a, b = ((a, b), (-b, a), (-a, -b), (b, -a))[_between(bits, 0, 3)]
    return a, b, h


def _two_colours(bits: np.random.Philox) -> np.ndarray:
    """int16 [2, 3] in 0..255: a colour and one near to it."""
    first = [_between(bits, 0, 255) for _ in range(3)]
    second = [min(max(c + _between(bits, -32, 32), 0), 255) for c in first]
    return np.array([first, second], np.int16)


def _mix(colours: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """int16 [height, width, 3] in 0..255: the first colour where the pattern is 0, the second where it is 64."""
    return colours[0] + ((colours[1] - colours[0]) * pattern[..., None] >> 6)


def _pattern(bits: np.random.Philox, height: int, width: int) -> np.ndarray:
    """int16 [height, width] in 0..64: a texture of random kind, direction and period."""
    kind = ('gradient', 'stripes', 'checks', 'waves', 'clouds')[_between(bits, 0, 4)]
    y, x = np.arange(height, dtype=np.int64)[:, None], np.arange(width, dtype=np.int64)
    if kind == 'clouds':  # random values on a grid, interpolated linearly
        power = _between(bits, 2, 5)
        cell = 1 << power
        rows, columns = height // cell + 2, width // cell + 2
        knots = np.array([_between(bits, 0, 64) for _ in range(rows * columns)], np.int64).reshape(rows, columns)
        along_y = np.maximum(cell - abs(y - cell * np.arange(rows)), 0)
        along_x = np.maximum(cell - abs(x - cell * np.arange(columns)[:, None]), 0)
        return (along_y @ knots @ along_x >> 2 * power).astype(np.int16)
    a, b, h = _rotation(bits)
    period = 2 * (height + width) if kind == 'gradient' else _between(bits, 6, 28)
    y, x = y + _between(bits, 0, 511), x + _between(bits, 0, 511)

    def phase(a: int, b: int) -> np.ndarray:  # 128 steps a period along the direction (a, b)
        return (a * 128 * x // (h * period)).astype(np.int16) + (b * 128 * y // (h * period)).astype(np.int16)

    if kind == 'stripes':
        return phase(a, b) & 64
    return (phase(a, b) ^ phase(-b, a)) & 64 if kind == 'checks' else abs((phase(a, b) & 127) - 64)


def _add_clutter(bits: np.random.Philox, canvas: np.ndarray, num_pieces: int) -> None:
    """Draws small blobs and bars, each in colours of its own, anywhere on the canvas."""
    height, width, _ = canvas.shape
    for _ in range(num_pieces):
        shape, low, high = _CLUTTER[_between(bits, 0, 1)]
        centre = _between(bits, 0, 4 * height), _between(bits, 0, 4 * width)
        radius = min(height, width) * _between(bits, low, high) // 100
        _stamp(bits, canvas, shape, _two_colours(bits), centre, radius, squeeze=_between(bits, 10, 16))


def _stamp(bits: np.random.Philox, canvas: np.ndarray, shape: Shape, colours: np.ndarray, centre: tuple[int, int],
           radius: int, squeeze: int) -> None:
    """Draws a shape, turned and textured at random, onto the canvas (int16 [H, W, 3]), which may cut it off.

    `centre` (y, x) and `radius`, UNIT's length, are in quarter pixels; `squeeze`: v's extent in sixteenths of u's.
    """
    a, b, h = _rotation(bits)
    top, left = (max((c - radius) // 4, 0) for c in centre)
    window = canvas[top:(centre[0] + radius) // 4 + 1, left:(centre[1] + radius) // 4 + 1]
    height, width, _ = window.shape
    # 2 x 2 samples a pixel, at odd numbers of quarter pixels. In sixteenths of a unit until u and v are summed.
    y = (2 * np.arange(2 * height, dtype=np.int64)[:, None] + 4 * top + 1 - centre[0]) * UNIT * 16
    x = (2 * np.arange(2 * width, dtype=np.int64) + 4 * left + 1 - centre[1]) * UNIT * 16
    along_u, along_v = h * radius, h * radius * squeeze // 16
    u = ((a * x // along_u).astype(np.int32) + (b * y // along_u).astype(np.int32)) >> 4
    v = ((-b * x // along_v).astype(np.int32) + (a * y // along_v).astype(np.int32)) >> 4
    inside = shape(u, v).astype(np.int16)
    coverage = inside[::2, ::2] + inside[1::2, ::2] + inside[::2, 1::2] + inside[1::2, 1::2]
    window += (_mix(colours, _pattern(bits, height, width)) - window) * coverage[..., None] >> 2


def encode(image: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 3] as a baseline JPEG of quality 90 without chroma subsampling."""
    # The bytes rest on TensorFlow's libjpeg-turbo. Its colour conversion, default DCT ('islow'; the float one differs
    # between machines) and quantisation are integer and exact; without optimize_size Huffman tables are the standard's.
    return tf.io.encode_jpeg(image, format='rgb', quality=90, optimize_size=False, chroma_downsampling=False).numpy()


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Ten drawn shapes, 5,000 images to train and 1,000 to test, every class equally often."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg')
        features = tfds.features.FeaturesDict({'image': image, 'label': tfds.features.ClassLabel(names=list(SHAPES))})
        return tfds.core.DatasetInfo(
            builder=self, features=features, supervised_keys=('image', 'label'), disable_shuffling=True,
            description='Ten drawn shapes of any place and direction, in random colours and textures, amid clutter.')

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in NUM_EXAMPLES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for index in range(NUM_EXAMPLES[split]):
            image, label = draw(split, index)
            yield index, {'image': encode(image), 'label': label}
