"""Encoded image -> uint8 pixels of the size the network takes, on the host.

A crop is `crop(encoded, rng, out)`, which fills `out`, uint8 [S, S, 3], its place in the batch, from bytes and the
example's own generator, whence all its randomness comes. It raises ValueError where the image cannot be decoded.

simplejpeg, OpenCV and Pillow are half again as fast as TensorFlow; Pillow's is the resampling of published accuracies.
"""
import contextlib
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin

Crop = Callable[[bytes, np.random.Generator, np.ndarray], None]

MAX_PIXELS = 2 * 1024**3 // 4 // 3  # more is taken for a decompression bomb: twice what Pillow begins to warn of
DECODERS = {b'\xff\xd8\xff': JpegImagePlugin.JpegImageFile, b'\x89PNG': PngImagePlugin.PngImageFile,
            b'GIF8': GifImagePlugin.GifImageFile, b'BM': BmpImagePlugin.BmpImageFile}
_PILLOW_ERRORS = (OSError, SyntaxError, EOFError, IndexError, OverflowError, TypeError, struct.error, zlib.error)
_IS_AMD = 'AuthenticAMD' in Path('/proc/cpuinfo').read_text()

cv2.setNumThreads(1)  # images are decoded in many threads already


def make_random_resized_crop(scale: tuple[float, float] = (0.08, 1.0),
                             ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Crop:
    """A random part of the image, resized: torchvision's RandomResizedCrop.

    `scale` is the range of the part's area as a fraction of the image's, uniform; `ratio` that of its width / height
    before the resize, which is bilinear, log-uniform. Not antialiased, unlike PIL's, but of a part at least twice as
    large as `out` pixels are averaged: a JPEG of one scan is decoded at a half, a quarter or an eighth of its size,
    and, as NVIDIA's DALI does, without smoothing chroma. Raises ValueError for a range that holds no part.
    """
    if not (len(scale) == len(ratio) == 2 and 0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1] < math.inf):
        raise ValueError(f'random_resized_crop: scale {scale} must be a range in (0, 1], ratio {ratio} one above 0')

    def crop(encoded, rng, out):
        uniform, image = rng.random(22).tolist(), None
        if header := _read_simple_jpeg_header(encoded):
            height, width, height_at = header
            window = crop_window(uniform, height, width, scale, ratio)
            factor = min(8, 1 << max(0, (min(window[2:]) // len(out)).bit_length() - 1))
            # A decoder that is told to skip what lies below still takes the time to read it, so that it is told of an
            # image that ends there: no pixel depends on those below its block, as nothing is smoothed.
            height = min(height, window[0] + window[2] + factor - 1)  # where the rounding below may end
            view = memoryview(encoded)  # whose slices are not copied
            with contextlib.suppress(ValueError):  # chroma of a size that it does not know
                image = simplejpeg.decode_jpeg(  # strict minds the rest behind the end
                    b''.join((view[:height_at], height.to_bytes(2), view[height_at + 2:])), fastupsample=True,
                    min_height=-(-height // factor), min_width=-(-width // factor), strict=False)
        if image is None:
            image, factor = decode(encoded), 1
            window = crop_window(uniform, *image.shape[:2], scale, ratio)
        top, left, height, width = window if factor == 1 else (round(side / factor) for side in window)
        _resize(image[top:top + height, left:left + width], out)

    return crop


def _resize(part: np.ndarray, out: np.ndarray) -> None:
    kernel = cv2.INTER_AREA if min(part.shape[:2]) >= 2 * len(out) else cv2.INTER_LINEAR  # which would leave pixels out
    if _IS_AMD:  # there Intel's resize takes half the time for four channels that it takes for three; the same pixels
        resized = cv2.resize(cv2.cvtColor(part, cv2.COLOR_RGB2RGBA), out.shape[:2], interpolation=kernel)
        cv2.cvtColor(resized, cv2.COLOR_RGBA2RGB, out)
    else:
        cv2.resize(part, out.shape[:2], out, interpolation=kernel)


def crop_window(uniform: Sequence[float], height: int, width: int, scale: tuple[float, float],
                ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the window of a random resized crop.

    uniform, 22 numbers in [0, 1), has area and log ratio of ten tries, then the window's place. The first try that
    fits is taken; if none does, the largest central window with an allowed ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw in zip(uniform[:10], uniform[10:20]):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(low + (high - low) * ratio_draw)
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(uniform[20] * (height - h + 1)), int(uniform[21] * (width - w + 1)), h, w
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def make_random_shift(max_shift: int = 2) -> Crop:
    """The whole image, moved by up to `max_shift` pixels each way over black, then resized; for small images."""
    def crop(encoded, rng, out):
        image = decode(encoded)
        height, width = image.shape[:2]
        padded = cv2.copyMakeBorder(image, *[max_shift] * 4, cv2.BORDER_CONSTANT)
        top, left = (int(draw * (2 * max_shift + 1)) for draw in rng.random(2))
        _resize(padded[top:top + height, left:left + width], out)

    return crop


def make_center_crop(resize: int = 256, interpolation: str = 'bicubic', dct_scaling: bool = False) -> Crop:
    """Shorter side to `resize`, centre cropped: torchvision's Resize and CenterCrop over PIL, antialiased.

    Nothing is random, and only what the crop keeps is resized. With dct_scaling a JPEG of at least twice the size
    is decoded at half of its size, or a quarter or an eighth: faster, and not quite the same pixels.
    """
    kernel = {'bicubic': Image.Resampling.BICUBIC, 'bilinear': Image.Resampling.BILINEAR}[interpolation]

    def crop(encoded, _, out):
        with _opened(encoded) as image:
            # As torchvision rounds: the longer side down, the offset of the crop to the nearest, halves to even.
            resized = [resize * side // min(image.size) for side in image.size]
            starts = [round((side - len(out)) / 2) for side in resized]
            if dct_scaling:
                image.draft('RGB', resized)
            box = [min(size, (start + edge) * size / side) for edge in (0, len(out))
                   for start, side, size in zip(starts, resized, image.size)]
            out[:] = np.asarray(image.convert('RGB').resize(out.shape[:2], kernel, tuple(box)))

    return crop


def decode(encoded: bytes) -> np.ndarray:
    """uint8 [H, W, 3] as PIL decodes to RGB: grey is repeated, alpha dropped, CMYK converted.

    Raises ValueError: no JPEG, PNG, GIF or BMP, a damaged one, or one of more than MAX_PIXELS.
    """
    with _opened(encoded) as image:
        return np.asarray(image.convert('RGB'))


@contextlib.contextmanager
def _opened(encoded: bytes) -> Iterator[Image.Image]:
    """The image, of which nothing but the header is decoded yet; errors of Pillow's become a ValueError."""
    decoder = next((decoder for start, decoder in DECODERS.items() if encoded.startswith(start)), None)
    if decoder is None:
        raise ValueError(f'no JPEG, PNG, GIF or BMP: it begins with {encoded[:12]!r}' if encoded else 'it is empty')
    try:
        with decoder(io.BytesIO(encoded)) as image:
            if not 0 < image.width * image.height <= MAX_PIXELS or image.mode[0] in 'IF':  # would be clipped to 8 bits
                raise ValueError(f'{image.format}: image of {image.height} x {image.width} pixels in mode {image.mode}')
            yield image
    except (*_PILLOW_ERRORS, Image.DecompressionBombError) as error:
        raise ValueError(f'{decoder.format} cannot be decoded: {error}') from error


def _read_simple_jpeg_header(encoded: bytes) -> tuple[int, int, int] | None:
    """Height, width and where the height stands, of a whole JPEG of one scan in one or three colours; else None."""
    if not encoded.startswith(b'\xff\xd8\xff') or not encoded.endswith(b'\xff\xd9'):
        return None
    at, header = 2, None
    while at + 10 <= len(encoded):
        marker, length = struct.unpack_from('>HH', encoded, at)
        if marker in (0xFFC0, 0xFFC1):  # SOF of sequential JPEGs
            height, width, channels = struct.unpack_from('>HHB', encoded, at + 5)
            if 0 < height * width <= MAX_PIXELS and channels in (1, 3):
                header = height, width, at + 5
        elif marker == 0xFFDA:  # SOS, with the number of channels in this scan
            return header if header and encoded[at + 4] == channels else None
        at += 2 + length
    return None
