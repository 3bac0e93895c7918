"""Encoded image -> uint8 pixels of the size the network takes, on the host.

A crop is `crop(encoded, seed, image_size) -> uint8 [image_size, image_size, 3]` of a string scalar and an int64 [2]
that is unique to the example and epoch; all its randomness is a function of `seed`. It fails with
InvalidArgumentError where the image cannot be decoded.
"""
import math
from collections.abc import Callable

import tensorflow as tf

Crop = Callable[[tf.Tensor, tf.Tensor, int], tf.Tensor]

# Pillow refuses images above this with DecompressionBombError: 2 * 1024**3 // 4 // 3 pixels.
MAX_PIXELS = 178_956_970
# What PIL uses; INTEGER_FAST, coarser by a grey level, was no faster (1.12 ms an image for both).
_DCT_METHOD = 'INTEGER_ACCURATE'


def make_random_resized_crop(scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3),
                             interpolation: str = 'bilinear') -> Crop:
    """A random part of the image, resized: torchvision's RandomResizedCrop.

    `scale` is the range of the part's area as a fraction of the image's, uniform; `ratio` that of its width / height
    before the resize, log-uniform. `interpolation` is 'bilinear' or 'bicubic', not antialiased: as OpenCV, with which
    the recipe of `imagenet.gin` and the GhostNet paper's code resize, and unlike PIL. Antialiasing would take as long
    as all the rest of the crop.
    """
    def crop(encoded, seed, image_size):
        encoded, height, width = checked(encoded)
        window = crop_window(tf.random.stateless_uniform([22], seed), height, width, scale, ratio)
        image = tf.cond(
            tf.io.is_jpeg(encoded),
            # Only what lies under the window goes through the inverse DCT.
            lambda: tf.image.decode_and_crop_jpeg(encoded, window, channels=3, dct_method=_DCT_METHOD),
            lambda: tf.image.crop_to_bounding_box(decode(encoded), *tf.unstack(window)))
        return _to_uint8(tf.image.resize(image, [image_size, image_size], interpolation))

    return crop


def crop_window(uniform: tf.Tensor, height: tf.Tensor, width: tf.Tensor, scale: tuple[float, float],
                ratio: tuple[float, float]) -> tf.Tensor:
    """The window of a random resized crop of an image of int32 scalars height, width: int32 [top, left, height, width].

    uniform, float32 [22] in [0, 1), has area and log ratio of ten tries, then the window's place. The first try that
    fits is taken; if none does, the largest central window with an allowed ratio.
    """
    size = tf.cast(tf.stack([height, width]), tf.float32)
    area = size[0] * size[1] * (scale[0] + (scale[1] - scale[0]) * uniform[0:10])
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    aspect = tf.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * uniform[10:20])
    tries = tf.round(tf.sqrt(tf.stack([area / aspect, area * aspect], axis=1)))
    fits = tf.reduce_all((tries > 0) & (tries <= size), axis=1)
    largest = tf.minimum(size, tf.round(size[::-1] * [1 / ratio[0], ratio[1]]))
    chosen = tf.where(tf.reduce_any(fits), tries[tf.argmax(fits)], largest)
    room = size - chosen
    place = tf.where(tf.reduce_any(fits), tf.minimum(tf.floor(uniform[20:22] * (room + 1)), room), tf.floor(room / 2))
    return tf.cast(tf.concat([place, chosen], 0), tf.int32)


def make_random_shift(max_shift: int = 2) -> Crop:
    """The whole image, moved by up to `max_shift` pixels each way over black, then resized; for small images."""
    def crop(encoded, seed, image_size):
        image = decode(checked(encoded)[0])
        shape = tf.shape(image)
        padded = tf.pad(image, [[max_shift, max_shift], [max_shift, max_shift], [0, 0]])
        shift = tf.random.stateless_uniform([2], seed, 0, 2 * max_shift + 1, tf.int32)
        moved = tf.slice(padded, tf.concat([shift, [0]], 0), shape)
        return _to_uint8(tf.image.resize(moved, [image_size, image_size]))

    return crop


def make_center_crop(resize: int = 256, interpolation: str = 'bicubic') -> Crop:
    """Shorter side to `resize`, centre cropped: torchvision's Resize and CenterCrop over PIL, antialiased as PIL is.

    Nothing is random, and only what the crop keeps is resized. As PIL does, columns are resized before rows and rounded
    to 8 bits in between: that keeps every pixel within one level of PIL's, where one pass is off by up to 6.
    """
    kernel = {'bicubic': 'keyscubic', 'bilinear': 'triangle'}[interpolation]

    def scale(images, out_size, factor, offset):
        factor, offset = tf.cast(factor, tf.float32), tf.cast(offset, tf.float32)
        return tf.raw_ops.ScaleAndTranslate(images=images, size=out_size, scale=factor, translation=-offset,
                                            kernel_type=kernel, antialias=True)

    def crop(encoded, _, image_size):
        image = decode(checked(encoded)[0])
        size = tf.shape(image)[:2]
        # As torchvision rounds: the longer side down, the offset of the crop to the nearest, halves to even.
        resized = resize * size // tf.reduce_min(size)
        offset = tf.round((resized - image_size) / 2)
        factor = resized / size
        # Each row as an image of height 1, then all columns as the channels of an image of width 1: the side that a
        # pass leaves alone costs nothing.
        columns = scale(image[:, tf.newaxis], [1, image_size], [1, factor[1]], [0, offset[1]])
        columns = tf.reshape(_to_uint8(columns), [1, size[0], 1, image_size * 3])
        rows = scale(columns, [image_size, 1], [factor[0], 1], [offset[0], 0])
        return tf.reshape(_to_uint8(rows), [image_size, image_size, 3])

    return crop


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors [H, W, C] left to right for half of all seeds."""
    # tf.reverse has a kernel of its own; image[:, ::-1] takes 1.6 ms at 224 pixels.
    is_flipped = tf.random.stateless_uniform([], seed + [0, 1 << 48], 0, 2, tf.int32) == 1  # other bits than the crop's
    return tf.cond(is_flipped, lambda: tf.reverse(image, [1]), lambda: image)


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, 3] as PIL decodes to RGB: grey is repeated, alpha dropped, CMYK converted."""
    return tf.cond(tf.io.is_jpeg(encoded),
                   lambda: tf.image.decode_jpeg(encoded, channels=3, dct_method=_DCT_METHOD),
                   lambda: tf.image.decode_image(encoded, channels=3, expand_animations=False))


def read_image_size(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width as the header has them, int32; nothing is decoded.

    Raises InvalidArgumentError: no JPEG, PNG, GIF or BMP, or of more than MAX_PIXELS, which the decoder would allocate.
    """
    def of_other():
        head = tf.io.decode_raw(tf.strings.substr(encoded, 0, 26), tf.uint8)
        # PNG: big-endian at 16; GIF: 16 bits little-endian at 6; BMP: 32 bits little-endian at 18. Width comes first.
        sides = tf.case(
            [(head[0] == 0x89, lambda: tf.bitcast(tf.reshape(head[16:24], [2, 4])[:, ::-1], tf.int32)),
             (head[0] == ord('G'), lambda: tf.cast(tf.bitcast(tf.reshape(head[6:10], [2, 2]), tf.uint16), tf.int32))],
            # BMP: a negative height says that the top row comes first.
            default=lambda: tf.abs(tf.bitcast(tf.reshape(head[18:26], [2, 4]), tf.int32)))
        return sides[::-1]

    size = tf.cond(tf.io.is_jpeg(encoded), lambda: tf.image.extract_jpeg_shape(encoded)[:2], of_other)
    height, width = tf.unstack(tf.ensure_shape(size, [2]))
    pixels = tf.cast(height, tf.int64) * tf.cast(width, tf.int64)
    is_sane = (height > 0) & (width > 0) & (pixels <= MAX_PIXELS)
    # The raw op: tf.debugging.Assert would wrap it in a conditional, a third of the cost of this function.
    with tf.control_dependencies([tf.raw_ops.Assert(condition=is_sane, data=['image of', height, width, 'pixels'])]):
        return tf.identity(height), tf.identity(width)


def checked(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The same bytes, but not before `read_image_size` has passed them; and what it has read."""
    height, width = read_image_size(encoded)
    with tf.control_dependencies([height, width]):  # or a decoder could run beside the check
        return tf.identity(encoded), height, width


def _to_uint8(image: tf.Tensor) -> tf.Tensor:
    return tf.saturate_cast(image + 0.5, tf.uint8)  # halves up, as PIL
