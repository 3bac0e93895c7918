"""Augmentation: each operation against PIL, what is drawn, the same pixels for any shards and after a resume."""
import collections
import itertools
import statistics

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

import input_pipeline
from input_pipeline import augment

FILL = (124, 116, 104)
LEVELS = (0.0, 1.7, 2.5, 3.0, 5.0, 7.31, 9.0, 10.0)
RAND_AUGMENT = ['AutoContrast', 'Equalize', 'Invert', 'Rotate', 'Posterize', 'Solarize', 'SolarizeAdd', 'Color',
                'Contrast', 'Brightness', 'Sharpness', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel']
STILL = (0.0, 0.0)  # `way` where it does not matter


def posterized(image, bits):
    """Since version 12 Pillow refuses 0 bits; before it made the image black."""
    return ImageOps.posterize(image, bits) if bits else image.point(lambda level: 0)


def enhanced(kind):
    return lambda image, level: kind(image).enhance(0.1 + 1.8 * level / 10)


# Of a PIL image and a level, as timm calls PIL.
TABLES = {
    'AutoContrast': lambda image, level: ImageOps.autocontrast(image),
    'Equalize': lambda image, level: ImageOps.equalize(image),
    'Invert': lambda image, level: ImageOps.invert(image),
    'Posterize': lambda image, level: posterized(image, int(level / 10 * 4)),
    'PosterizeOriginal': lambda image, level: posterized(image, int(level / 10 * 4) + 4),
    'Solarize': lambda image, level: ImageOps.solarize(image, min(256, int(level / 10 * 256))),
    'SolarizeAdd': lambda image, level: image.point(
        [min(255, i + min(128, int(level / 10 * 110))) if i < 128 else i for i in range(256)] * 3)}
BLENDS = {name: enhanced(getattr(ImageEnhance, name)) for name in ('Brightness', 'Contrast', 'Color', 'Sharpness')}
# Of a width, a height and an amount in -1..1: what Image.transform takes.
AFFINE = {
    'ShearX': lambda width, height, amount: (1, 0.3 * amount, 0, 0, 1, 0),
    'ShearY': lambda width, height, amount: (1, 0, 0, 0.3 * amount, 1, 0),
    'TranslateXRel': lambda width, height, amount: (1, 0, 0.45 * amount * width, 0, 1, 0),
    'TranslateYRel': lambda width, height, amount: (1, 0, 0, 0, 1, 0.45 * amount * height)}


def moved(name, image, amount, resample, fill):
    if name == 'Rotate':
        return image.rotate(30 * amount, resample=resample, fillcolor=fill)
    return image.transform(image.size, Image.Transform.AFFINE, AFFINE[name](*image.size, amount), resample=resample,
                           fillcolor=fill)


@pytest.fixture(scope='module')
def images(photo):
    """Photographs, a grey one, one of few levels, ones of one colour and of two, noise."""
    grey = np.repeat(photo(3, 64, 80)[..., :1], 3, axis=2)
    flat = np.full((40, 56, 3), (10, 200, 77), np.uint8)
    two = flat.copy()
    two[7:9, 3:5] = (11, 199, 255)
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    return [photo(0, 224, 224), photo(1, 96, 128), grey, photo(4, 60, 90) // 32 * 9 + 40, flat, two, noise]


def generator(*key):
    return np.random.Generator(np.random.Philox(key=np.array([*key, 0, 0][:2], np.uint64)))


@pytest.mark.parametrize('name', TABLES)
def test_what_goes_by_tables_equals_pil(images, name):
    for image, level in itertools.product(images, LEVELS):
        wanted = np.asarray(TABLES[name](Image.fromarray(image), level))
        np.testing.assert_array_equal(augment.apply(name, image, level, STILL), wanted, f'{name} {level}')


@pytest.mark.parametrize('name', BLENDS)
def test_what_is_blended_is_within_a_grey_level_of_pil(images, name):
    """Equal but for 2 % of the pixels: OpenCV's weights of grey differ from PIL's in the sixteenth bit."""
    for image, level in itertools.product(images, LEVELS):
        difference = augment.apply(name, image, level, STILL).astype(int) - BLENDS[name](Image.fromarray(image), level)
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < (0.02 if name == 'Color' else 0.002), level


@pytest.mark.parametrize('name', ['Rotate', *AFFINE])
@pytest.mark.parametrize('amount', [0.0, 0.17, -0.5, 0.731, -0.9, 1.0])
def test_geometry_is_that_of_pil(photo, name, amount):
    """PIL cuts off where OpenCV rounds, which is half a grey level on the average and one at most.

    All else of it stands along the edges of the image, which OpenCV blends with the fill: some 2 (h + w) of h w pixels,
    by half the contrast at most. The bicubic kernels have slopes of -0.75 and -1 besides, so that their weights differ
    by up to 0.03 a tap, and OpenCV takes steps of 1/32 pixel: 2 grey levels on the average of images as noisy as these.
    """
    inner = np.ones((5, 5), np.uint8)  # what is as far as that from an edge has all its taps on one side of it
    for image in (photo(0, 224, 224), photo(1, 96, 128)):
        is_image = np.asarray(moved(name, Image.new('1', image.shape[1::-1], 1), amount, Image.Resampling.NEAREST, 0))
        inside = cv2.erode(np.uint8(is_image), inner, borderValue=0) > 0
        outside = cv2.erode(np.uint8(~is_image), inner, borderValue=1) > 0
        assert inside.mean() > 0.4 and outside.any() == (abs(amount) > 0.1)
        for resample, draw, bound in ((Image.Resampling.BILINEAR, 0.499, 0.7), (Image.Resampling.BICUBIC, 0.5, 2.0)):
            ours = augment.apply(name, image, 10 * abs(amount), (0.499 if amount >= 0 else 0.5, draw)).astype(int)
            difference = np.abs(ours - moved(name, Image.fromarray(image), amount, resample, FILL))
            assert difference.mean() <= (bound if amount else 0)
            assert difference[inside].max() <= (1 if resample == Image.Resampling.BILINEAR else 15)
            assert (ours[outside] == FILL).all()


@pytest.mark.parametrize('size', [(1, 1), (1, 5), (2, 2), (3, 3), (5, 4)])
def test_images_of_few_pixels(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    for name, by_pil in (TABLES | BLENDS).items():
        wanted = np.asarray(by_pil(Image.fromarray(image), 9.0)).astype(int)
        assert np.abs(augment.apply(name, image, 9.0, STILL) - wanted).max() <= (name in BLENDS), name
    for name in ('Rotate', *AFFINE):
        assert augment.apply(name, image, 9.0, STILL).shape == image.shape


def test_grey_stays_grey(images):
    grey = images[2]
    for name in (*TABLES, *BLENDS):
        changed = augment.apply(name, grey, 7.0, STILL)
        assert (changed == changed[..., :1]).all(), name
    for factor in (0.0, 0.3, 1.9):  # and has no colour to be changed
        np.testing.assert_array_equal(augment.apply('Color', grey, (factor - 0.1) / 0.18, STILL), grey)


MAKERS = {'rand': input_pipeline.make_rand_augment, 'auto': input_pipeline.make_auto_augment,
          'jitter': input_pipeline.make_color_jitter}


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
def test_an_augmentation_is_a_function_of_image_and_generator(images, make):
    change, kinds = make(), set()
    for number, image in enumerate(images[1:]):
        given = image.copy()
        given.flags.writeable = False
        for i in range(40):
            changed = change(given, generator(number, i))
            assert changed.dtype == np.uint8 and changed.shape == image.shape and changed.flags.c_contiguous
            np.testing.assert_array_equal(given, image)
            np.testing.assert_array_equal(make()(image, generator(number, i)), changed)
            kinds.add(changed.tobytes())
    assert len(kinds) > 100


@pytest.fixture
def drawn(monkeypatch):
    """drawn(augmentation, count): what it applies, as [(name, level, way), ...] of each of so many images."""
    def draw(change, count):
        applied, rng = [], generator(5)
        monkeypatch.setattr(augment, 'apply', lambda name, image, level, way: applied[-1].append((name, level, way)))
        for _ in range(count):
            applied.append([])
            change(None, rng)
        return applied

    return draw


def assert_counts(counted, expected):
    """Pearson's statistic stands less than five of its standard deviations above its mean; {outcome: number} each."""
    assert counted.keys() <= expected.keys()
    surplus = sum((counted[key] - number) ** 2 / number for key, number in expected.items()) - (len(expected) - 1)
    assert surplus < 5 * np.sqrt(2 * (len(expected) - 1)), (counted, expected)


def assert_uniform(numbers):
    assert min(numbers) >= 0 and max(numbers) < 1
    assert_counts(collections.Counter(np.int64(np.float64(numbers) * 20).tolist()),
                  dict.fromkeys(range(20), len(numbers) / 20))


def test_what_rand_augment_draws(drawn):
    count = 20_000
    applied = drawn(input_pipeline.make_rand_augment(), count)
    assert_counts(collections.Counter(map(len, applied)), {0: count / 4, 1: count / 2, 2: count / 4})
    steps = list(itertools.chain(*applied))
    assert_counts(collections.Counter(name for name, _, _ in steps), dict.fromkeys(RAND_AUGMENT, len(steps) / 15))
    pairs = [(first[0], second[0]) for first, second in (step for step in applied if len(step) == 2)]
    assert_counts(collections.Counter(pairs),
                  dict.fromkeys(itertools.product(RAND_AUGMENT, repeat=2), len(pairs) / 225))
    levels, normal = np.array([level for _, level, _ in steps]), statistics.NormalDist(9, 0.5)
    assert levels.max() == 10
    for level in (7.5, 8.0, 8.5, 9.0, 9.5, 9.999):
        below = normal.cdf(level)
        assert abs((levels < level).mean() - below) < 5 * np.sqrt(below * (1 - below) / len(levels))
    for i in range(2):
        assert_uniform([way[i] for _, _, way in steps])
    assert abs(np.corrcoef(np.array([way for _, _, way in steps]).T)[0, 1]) < 5 / np.sqrt(len(steps))


def test_settings_of_rand_augment(drawn):
    applied = drawn(input_pipeline.make_rand_augment(magnitude=0.2, magnitude_std=3.0, num_layers=5), 2000)
    assert_counts(collections.Counter(map(len, applied)),
                  {n: 2000 * number / 32 for n, number in enumerate((1, 5, 10, 10, 5, 1))})
    levels = np.array([level for step in applied for _, level, _ in step])
    assert levels.min() == 0 and abs((levels == 0).mean() - statistics.NormalDist(0.2, 3).cdf(0)) < 0.04
    applied = drawn(input_pipeline.make_rand_augment(magnitude_std=0.0), 20)
    assert {level for step in applied for _, level, _ in step} == {9}


def test_what_auto_augment_draws(drawn):
    """Each of its pairs as often as the others, and of each its operations as often as they are meant to be."""
    count = 25_000
    expected = collections.Counter()
    for first, second in augment._POLICY:
        for is_first, is_second in itertools.product((True, False), repeat=2):
            chance = (first[1] if is_first else 1 - first[1]) * (second[1] if is_second else 1 - second[1])
            steps = [step[::2] for step, is_taken in ((first, is_first), (second, is_second)) if is_taken]
            expected[tuple(steps)] += count / 25 * chance
    applied = drawn(input_pipeline.make_auto_augment(), count)
    assert_counts(collections.Counter(tuple((name, level) for name, level, _ in steps) for steps in applied),
                  {steps: number for steps, number in expected.items() if number})
    for i in range(2):
        assert_uniform([way[i] for steps in applied for _, _, way in steps])


def test_what_color_jitter_draws(drawn):
    count, spans = 6000, {'Brightness': 0.4, 'Contrast': 0.2, 'Color': 1.5}
    applied = drawn(input_pipeline.make_color_jitter(*spans.values()), count)
    assert_counts(collections.Counter(tuple(name for name, _, _ in steps) for steps in applied),
                  dict.fromkeys(itertools.permutations(spans), count / 6))
    for name, span in spans.items():
        low, high = max(0, 1 - span), 1 + span
        factors = np.array([0.1 + 0.18 * level for steps in applied for n, level, _ in steps if n == name])
        assert_uniform((factors - low) / (high - low))


def test_color_jitter_is_pil_enhancing_thrice(photo, monkeypatch):
    image, factors, apply = photo(0, 48, 64), [], augment.apply
    monkeypatch.setattr(augment, 'apply', lambda name, image, level, way: (
        factors.append((name, 0.1 + 0.18 * level)), apply(name, image, level, way))[1])
    for i in range(20):
        factors.clear()
        ours, wanted = input_pipeline.make_color_jitter()(image, generator(i)), Image.fromarray(image)
        for name, factor in factors:
            wanted = getattr(ImageEnhance, name)(wanted).enhance(factor)
        assert np.abs(ours.astype(int) - wanted).max() <= 3  # one, thrice changed by up to 1.4


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
def test_the_same_pixels_for_any_shards_and_after_a_resume(photo, make):
    source = input_pipeline.array_source(np.stack([photo(seed, 40, 52) for seed in range(37)]), np.arange(37) % 5)

    def train(num_batches, source=source, **options):
        options = {'global_batch_size': 8, 'image_size': 24, 'seed': 3, 'augment': make()} | options
        batches = itertools.islice(input_pipeline.train_dataset(source, **options), num_batches)
        return [batch['image'].numpy() for batch in batches]

    plain = train(12, augment=None)
    for again, options in ((source, {}), (source.cached(), {'shuffle_block': 2})):  # with all that can be switched on
        whole = train(12, **options)
        assert (np.concatenate(whole) != np.concatenate(plain)).any(axis=(1, 2, 3)).mean() > 0.5
        for num_shards in (2, 4):
            shards = [train(6, again, shard=shard, num_shards=num_shards, **options) for shard in range(num_shards)]
            np.testing.assert_array_equal([np.concatenate(parts) for parts in zip(*shards)], whole[:6])
        np.testing.assert_array_equal(train(7, again, start_position=8 * 5, **options), whole[5:])
        np.testing.assert_array_equal(train(1, again, start_position=37, global_batch_size=20, **options)[0],
                                      np.concatenate(whole)[37:57])


@pytest.mark.parametrize('make', [
    lambda: augment.make_rand_augment(magnitude=11), lambda: augment.make_rand_augment(magnitude_std=-0.5),
    lambda: augment.make_rand_augment(num_layers=0), lambda: augment.make_rand_augment(num_layers=1.5),
    lambda: augment.make_color_jitter(contrast=-0.1), lambda: augment.make_color_jitter(saturation=float('nan'))])
def test_values_out_of_range_are_refused_where_they_are_given(make):
    with pytest.raises(ValueError, match='must'):
        make()
