"""Pixels are those that PIL and torchvision's rules give."""

import io
import math
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
import tensorflow as tf
from PIL import Image

from input_pipeline import preprocess


def generator(*seed):
    return np.random.default_rng(seed)


def cropped(crop, encoded, rng, image_size):
    """What a crop writes into its place in a batch, whatever was there."""
    places = [np.full([image_size, image_size, 3], value, np.uint8) for value in (0, 255)]
    states = rng.bit_generator.state
    for place in places:
        rng.bit_generator.state = states
        crop(encoded, rng, place)
    np.testing.assert_array_equal(*places)
    return places[0].astype(int)


def pil_resize_and_crop(encoded, resize, image_size, interpolation):
    """torchvision's Resize(resize) and CenterCrop(image_size) on a PIL image, written from its documentation."""
    image = Image.open(io.BytesIO(encoded)).convert('RGB')
    short, long = sorted(image.size)
    size = tuple(resize if side == short else int(resize * long / short) for side in image.size)
    image = image.resize(size, Image.Resampling[interpolation.upper()])
    left, top = (int(round((side - image_size) / 2.0)) for side in size)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size))).astype(int)


@pytest.mark.parametrize(('height', 'width', 'resize', 'image_size', 'interpolation'), [
    (375, 500, 256, 224, 'bicubic'), (500, 375, 256, 224, 'bicubic'), (333, 497, 256, 224, 'bilinear'),
    (301, 443, 256, 224, 'bicubic'), (120, 90, 256, 224, 'bicubic'), (375, 500, 72, 64, 'bilinear'),
    (256, 257, 256, 224, 'bicubic'), (28, 28, 56, 56, 'bilinear'), (97, 640, 73, 64, 'bicubic')])
def test_evaluation_is_that_of_pil(photo, encode, height, width, resize, image_size, interpolation):
    crop = preprocess.make_center_crop(resize, interpolation)
    for seed in range(3):
        encoded = encode(photo(seed, height, width))
        ours = cropped(crop, encoded, generator(), image_size)
        difference = np.abs(ours - pil_resize_and_crop(encoded, resize, image_size, interpolation))
        assert difference.mean() <= 0.01
        assert difference.max() <= 1


def torchvision_window(uniform, height, width, scale, ratio):
    """torchvision's RandomResizedCrop.get_params, its draws taken from `uniform` in our layout."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for k in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[k])
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * uniform[10 + k])
        w, h = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return int(uniform[20] * (height - h + 1)), int(uniform[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < min(ratio):
        h = int(round(w / min(ratio)))
    elif width / height > max(ratio):
        w = int(round(h * max(ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(('height', 'width'), [(375, 500), (500, 375), (28, 28), (40, 700), (700, 40), (1, 9), (1, 1)])
def test_crop_window_is_that_of_torchvision(height, width):
    rng = np.random.default_rng(0)
    for _ in range(200):
        uniform = rng.random(22)
        wanted = torchvision_window(uniform, height, width, (0.08, 1.0), (3 / 4, 4 / 3))
        assert preprocess.crop_window(uniform, height, width, (0.08, 1.0), (3 / 4, 4 / 3)) == wanted


def test_crop_window_falls_back_to_the_centre():
    never_fits = np.full(22, 0.999)
    for (height, width), wanted in [((100, 1000), (0, 433, 100, 133)), ((1000, 100), (433, 0, 133, 100))]:
        assert preprocess.crop_window(never_fits, height, width, (0.9, 1.0), (3 / 4, 4 / 3)) == wanted


def test_crop_windows_cover_the_range_of_areas_and_ratios():
    windows = np.array([preprocess.crop_window(generator(1, i).random(22), 400, 400, (0.25, 0.75), (3 / 4, 4 / 3))
                        for i in range(600)])
    areas, ratios = windows[:, 2] * windows[:, 3] / 160_000, windows[:, 3] / windows[:, 2]
    assert 0.24 < areas.min() < 0.27 < 0.73 < areas.max() < 0.76
    assert 0.74 < ratios.min() < 0.77 < 1.30 < ratios.max() < 1.35
    assert abs(areas.mean() - 0.5) < 0.03
    assert abs(np.log(ratios).mean()) < 0.03
    assert (windows[:, :2] + windows[:, 2:] <= 400).all()


def window_of(encoded, rng):
    width, height = Image.open(io.BytesIO(encoded)).size
    return preprocess.crop_window(rng.random(22), height, width, (0.08, 1.0), (3 / 4, 4 / 3))


@pytest.mark.parametrize('kind', ['4:2:0', '4:4:4', 'grey', 'PNG'])
def test_random_resized_crop_shows_its_window(photo, encode, kind):
    # A window much smaller than the target: without antialiasing PIL's and our bilinear kernel are then the same.
    image = Image.fromarray(photo(1, 60, 80)).convert('L' if kind == 'grey' else 'RGB')
    options = {'subsampling': kind} if ':' in kind else {}
    encoded = encode(image, 'PNG' if kind == 'PNG' else 'JPEG', **options)
    crop = preprocess.make_random_resized_crop()
    decoded = Image.open(io.BytesIO(encoded)).convert('RGB')
    if kind == '4:2:0':  # PIL smooths chroma, which DALI and we do not; TensorFlow can do either
        decoded = Image.fromarray(tf.io.decode_jpeg(encoded, 3, 1, False, dct_method='INTEGER_ACCURATE').numpy())
    for i in range(8):
        top, left, height, width = window_of(encoded, generator(i, 5))
        part = decoded.crop((left, top, left + width, top + height))
        wanted = np.asarray(part.resize((96, 96), Image.Resampling.BILINEAR)).astype(int)
        difference = np.abs(cropped(crop, encoded, generator(i, 5), 96) - wanted)
        assert difference.mean() <= 0.5
        assert np.quantile(difference, 0.99) <= (1 if kind == 'PNG' else 3)


@pytest.mark.parametrize(('height', 'width', 'options'), [
    (375, 500, {}), (500, 375, {}), (375, 500, {'subsampling': '4:4:4'}), (333, 211, {'subsampling': '4:2:2'}),
    (375, 500, {'restart_marker_rows': 2}), (375, 500, {'progressive': True}), (1100, 1400, {'optimize': True})])
def test_what_lies_below_the_window_is_not_missed(photo, encode, height, width, options):
    """All of a JPEG is decoded where its header says nothing else: the same pixels, whatever is left unread."""
    encoded = encode(photo(4, height, width), **options)
    behind = encoded + b'\0'  # no longer a JPEG that can be decoded in part
    for image_size in (64, 224):
        crop = preprocess.make_random_resized_crop((0.05, 0.6))
        for i in range(6):
            top, left, rows, columns = (np.array(preprocess.crop_window(
                generator(i).random(22), height, width, (0.05, 0.6), (3 / 4, 4 / 3))))
            whole = simplejpeg.decode_jpeg(encoded, fastupsample=True)
            part = np.ascontiguousarray(whole[top:top + rows, left:left + columns])
            ours = cropped(crop, encoded, generator(i), image_size)
            if min(rows, columns) < 2 * image_size and not options.get('progressive'):
                np.testing.assert_array_equal(ours, cv2.resize(part, (image_size, image_size)))
            # In all cases, DCT scaling included, near to what PIL makes of the part.
            with Image.open(io.BytesIO(behind)) as pil:
                box = left, top, left + columns, top + rows
                wanted = np.asarray(pil.convert('RGB').resize((image_size,) * 2, Image.Resampling.BOX, box)).astype(int)
            assert abs(ours.mean() - wanted.mean()) < 2


@pytest.mark.parametrize('kind', ['baseline', 'progressive', 'trailing byte', 'PNG'])
@pytest.mark.parametrize('image_size', [24, 100])
def test_large_parts_are_averaged_whatever_the_format(photo, encode, kind, image_size):
    """As PIL's antialiased kernel does; bilinear interpolation alone would pick single pixels."""
    noise = generator(5).integers(-60, 60, (1000, 1000, 1))
    image = (photo(5, 1000, 1000) + noise).clip(0, 255).astype(np.uint8)
    encoded = encode(image, 'PNG') if kind == 'PNG' else encode(image, progressive=kind == 'progressive')
    encoded += b'\0' * (kind == 'trailing byte')
    with Image.open(io.BytesIO(encoded)) as pil:
        wanted = np.asarray(pil.convert('RGB').resize((image_size,) * 2, Image.Resampling.BILINEAR)).astype(int)
    for crop in (preprocess.make_random_resized_crop((1, 1), (1, 1)), preprocess.make_random_shift(0)):
        assert np.abs(cropped(crop, encoded, generator(), image_size) - wanted).mean() < 4


@pytest.mark.parametrize('is_exact', [True, False])
def test_processors_of_both_makers_give_the_same_pixels(photo, monkeypatch, is_exact):
    image = photo(6, 500, 500)
    before = cv2.ipp.useIPP_NotExact()
    cv2.ipp.setUseIPP_NotExact(not is_exact)
    try:
        for height, width, size in ((31, 47, 96), (224, 224, 224), (300, 401, 224), (500, 430, 224), (499, 500, 100)):
            resized = np.zeros([2, size, size, 3], np.uint8)
            for is_amd in (False, True):
                monkeypatch.setattr(preprocess, '_IS_AMD', is_amd)
                preprocess._resize(image[-height:, -width:], resized[int(is_amd)])
            np.testing.assert_array_equal(*resized)
    finally:
        cv2.ipp.setUseIPP_NotExact(before)


@pytest.mark.parametrize('factors', [(0x31, 0x11, 0x11), (0x22, 0x12, 0x11), (0x42, 0x11, 0x11)])
def test_unusual_chroma_is_decoded_as_pil_does(encode, factors):
    encoded = bytearray(encode(np.full([64, 64, 3], 200, np.uint8), subsampling='4:4:4'))
    at = encoded.index(b'\xff\xc0')
    for channel, factor in enumerate(factors):
        encoded[at + 11 + 3 * channel] = factor
    encoded = bytes(encoded)
    with pytest.raises(ValueError, match='subsampling'):
        simplejpeg.decode_jpeg(encoded)
    wanted = np.asarray(Image.open(io.BytesIO(encoded)).convert('RGB').resize((16, 16), Image.Resampling.BOX))
    crop = preprocess.make_random_resized_crop((1, 1), (1, 1))
    assert np.abs(cropped(crop, encoded, generator(), 16) - wanted.astype(int)).mean() < 1


@pytest.mark.parametrize(('scale', 'ratio'), [((8, 100), (0.75, 1.33)), ((0, 1), (1, 1)), ((0.5,), (1, 1)),
                                              ((1.0, 0.08), (1, 1)), ((0.08, 1), (0, 1)), ((0.08, 1), (2, 1))])
def test_ranges_that_hold_no_part_are_refused(scale, ratio):
    with pytest.raises(ValueError, match='random_resized_crop: scale'):
        preprocess.make_random_resized_crop(scale, ratio)


def test_random_shift_moves_over_black(photo, encode):
    image = photo(3, 28, 28)
    padded = np.pad(image, [(2, 2), (2, 2), (0, 0)])
    crop = preprocess.make_random_shift(2)
    seen = set()
    for i in range(150):
        moved = cropped(crop, encode(image, 'PNG'), generator(i), 28)
        matches = [(y, x) for y in range(5) for x in range(5) if (padded[y:y + 28, x:x + 28] == moved).all()]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 25


def test_random_shift_resizes_bilinearly(photo, encode):
    image = photo(3, 28, 28)
    still = cropped(preprocess.make_random_shift(0), encode(image, 'PNG'), generator(), 56)
    wanted = np.asarray(Image.fromarray(image).resize((56, 56), Image.Resampling.BILINEAR))
    assert np.abs(still - wanted).max() <= 1


def test_formats_decode_as_pil_does(photo, encode):
    image = Image.fromarray(photo(0, 60, 80))
    for kind, converted, tolerance in [
            ('JPEG', image, 2), ('JPEG', image.convert('L'), 2), ('JPEG', image.convert('CMYK'), 3), ('PNG', image, 0),
            ('PNG', image.convert('L'), 0), ('PNG', image.convert('P'), 0), ('PNG', image.convert('RGBA'), 0),
            ('GIF', image.convert('P'), 0), ('BMP', image, 0)]:
        encoded = encode(converted, kind)
        wanted = np.asarray(Image.open(io.BytesIO(encoded)).convert('RGB')).astype(int)
        difference = np.abs(preprocess.decode(encoded) - wanted)
        assert difference.max() <= tolerance, (kind, converted.mode)
        for make in (preprocess.make_random_resized_crop, preprocess.make_random_shift, preprocess.make_center_crop):
            assert cropped(make(), encoded, generator(), 32).std() > 0


def test_training_crop_of_cmyk_jpeg_is_that_of_its_rgb(photo, encode):
    image = Image.fromarray(photo(0, 60, 80)).convert('CMYK')
    encoded = encode(image)
    top, left, height, width = window_of(encoded, generator(12))
    part = Image.open(io.BytesIO(encoded)).convert('RGB').crop((left, top, left + width, top + height))
    wanted = np.asarray(part.resize((96, 96), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(cropped(preprocess.make_random_resized_crop(), encoded, generator(12), 96) - wanted).mean() < 1.5


def test_a_header_that_claims_too_much_is_refused_before_decoding(photo, encode):
    jpeg = bytearray(encode(photo(0, 32, 32)))
    at = jpeg.index(b'\xff\xc0') + 5
    jpeg[at:at + 4] = struct.pack('>HH', 65000, 65000)
    header = b'IHDR' + struct.pack('>IIBBBBB', 20_000, 10_000, 8, 2, 0, 0, 0)
    png = bytearray(encode(photo(0, 32, 32), 'PNG'))
    png[12:33] = header + struct.pack('>I', zlib.crc32(header))
    for bomb, size in [(jpeg, '65000 65000'), (png, '10000 20000')]:
        for make in (preprocess.make_random_resized_crop, preprocess.make_random_shift, preprocess.make_center_crop):
            with pytest.raises(ValueError) as error:
                cropped(make(), bytes(bomb), generator(), 32)
            assert 'image of' in str(error.value)
            assert all(side in str(error.value) for side in size.split())


@pytest.mark.parametrize('junk', [b'', b'\xff\xd8\xff', b'hello, this is no image at all', b'\x89PNG', b'GIF89a'])
def test_junk_is_an_error(junk):
    for make in (preprocess.make_random_resized_crop, preprocess.make_random_shift, preprocess.make_center_crop):
        with pytest.raises(ValueError):
            cropped(make(), junk, generator(), 32)
