"""Examples that are not what they should be, in every kind of source.

Those that are images all the same are decoded as PIL does; the others are black, masked and told of, and no other row
differs from what it is without them.
"""

import io
import itertools
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from input_pipeline.preprocess import decode

COUNT, CLASSES = 48, 3
BATCH, SIZE = 12, 24


def with_size(jpeg, width, height):
    """The same JPEG with another size in its header."""
    at = jpeg.index(b'\xff\xc0')
    return jpeg[:at + 5] + struct.pack('>HH', height, width) + jpeg[at + 9:]


@pytest.fixture(scope='module')
def good(photo, encode):
    return [encode(photo(seed, 40, 52)) for seed in range(COUNT)]


@pytest.fixture(scope='module')
def odd(photo, encode):
    """{what: bytes}: odd, but images; all in files that are named as JPEGs."""
    image = Image.fromarray(photo(100, 40, 52))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    return {'cmyk': encode(image.convert('CMYK')), 'grey': encode(image.convert('L')), 'png': encode(image, 'PNG'),
            'png with alpha': encode(image.convert('RGBA'), 'PNG'), 'gif': encode(image, 'GIF'),
            'bmp': encode(image, 'BMP'), 'one pixel': encode(image.resize((1, 1))),
            'thin': encode(image.resize((20_000, 3))), 'exif': encode(image, exif=exif)}


@pytest.fixture(scope='module')
def bad(photo, encode):
    """{what: (bytes, word of the reason)}."""
    image = photo(100, 40, 52)
    jpeg, png = encode(image), bytearray(encode(image, 'PNG'))
    png[16:24] = struct.pack('>II', 60_000, 60_000)
    png[29:33] = struct.pack('>I', zlib.crc32(png[12:29]))
    # One frame that is larger than the whole.
    gif = (b'GIF89a' + struct.pack('<HHBBB', 10, 10, 0x80, 0, 0) + bytes(6) + b','
           + struct.pack('<HHHHB', 0, 0, 30_000, 30_000, 0) + b'\x02\x02\x4c\x01\x00;')
    return {'empty': (b'', 'empty'), 'truncated': (jpeg[:len(jpeg) // 2], 'JPEG'),
            'page': (b'<html>404</html>', '<html>'), 'webp': (encode(image, 'WEBP'), 'RIFF'),
            'header only': (jpeg[:20], 'JPEG'),
            'bomb': (with_size(jpeg, 60_000, 60_000), '60000'), 'no pixels': (with_size(jpeg, 0, 40), 'JPEG'),
            'png bomb': (bytes(png), '60000'), 'gif bomb': (gif, 'GIF'),
            '16 bits': (encode(Image.fromarray(np.arange(0, 65_000, 50, np.uint16).reshape(26, 50)), 'PNG'), 'I;16')}


def write(kind, directory, images, writers):
    """As many examples of each class as of the others, in the order of the source."""
    labels = np.arange(COUNT) * CLASSES // COUNT
    if kind != 'folder':
        writers[kind](directory, 'train', list(zip(images, labels.tolist())))
        return input_pipeline.open_source(kind, directory, 'train')
    for i, (image, label) in enumerate(zip(images, labels)):
        path = directory / 'train' / f'class{label}' / f'{i:03d}.JPEG'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return input_pipeline.open_source('folder', directory, 'train')


@pytest.fixture(params=['folder', 'tfrecord', 'arrayrecord'])
def make_source(request, tmp_path_factory, write_tfrecords, write_arrayrecords):
    """make_source(images) of one kind."""
    writers = {'tfrecord': write_tfrecords, 'arrayrecord': write_arrayrecords}
    return lambda images: write(request.param, tmp_path_factory.mktemp(request.param), images, writers)


def stream(source, evaluation=False, num_shards=1):
    """Seven batches, two of them of the next epoch, or all of an evaluation; and what was told of bad examples."""
    told, shards = [], []
    for shard in range(num_shards):
        options = {'global_batch_size': BATCH, 'image_size': SIZE, 'shard': shard, 'num_shards': num_shards,
                   'on_bad': lambda position, index: told.append((position, index))}
        dataset = (input_pipeline.eval_dataset(source, resize=28, **options) if evaluation
                   else input_pipeline.train_dataset(source, seed=5, **options))
        shards.append([{key: x.numpy() for key, x in batch.items()} for batch in itertools.islice(dataset, 7)])
    return {key: np.concatenate([part[key] for parts in zip(*shards) for part in parts])
            for key in shards[0][0]}, sorted(told)


def assert_others_equal(found, wanted, is_other):
    for key in ('label', 'index'):
        np.testing.assert_array_equal(found[key], wanted[key])
    np.testing.assert_array_equal(found['image'][is_other], wanted['image'][is_other])
    assert found['mask'][is_other].all()


@pytest.mark.parametrize('evaluation', [False, True])
def test_odd_images_are_used(make_source, good, odd, evaluation):
    images = good.copy()
    images[5:5 + len(odd)] = odd.values()
    source = make_source(images)
    found, told = stream(source, evaluation)
    assert told == [] and found['mask'].all()
    is_odd = (found['index'] >= 5) & (found['index'] < 5 + len(odd))
    assert_others_equal(found, stream(make_source(good), evaluation)[0], ~is_odd)
    assert found['image'][is_odd].any(axis=(1, 2, 3)).all()


def test_odd_images_are_decoded_as_pil_does(odd):
    for name, encoded in odd.items():
        image = Image.open(io.BytesIO(encoded))
        wanted = np.asarray(image.convert('RGB'))  # which leaves the EXIF orientation alone
        difference = np.abs(decode(encoded).astype(int) - wanted)
        assert difference.max() <= (3 if name == 'cmyk' else 2), name


@pytest.mark.parametrize('evaluation', [False, True])
def test_bad_images_are_black_masked_and_told_of(make_source, good, bad, evaluation):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images, indices = good.copy(), range(7, 7 + 3 * len(bad), 3)
    for index, (encoded, _) in zip(indices, bad.values()):
        images[index] = encoded
    source = make_source(images)
    found, told = stream(source, evaluation)
    is_bad = np.isin(found['index'], indices)
    np.testing.assert_array_equal(found['mask'], ~is_bad)
    assert not found['image'][is_bad].any()
    assert_others_equal(found, stream(make_source(good), evaluation)[0], ~is_bad)
    # Those of the batches taken, and maybe of some that were read ahead.
    rows = [(row, int(found['index'][row])) for row in np.flatnonzero(is_bad)]
    assert [entry for entry in told if entry[0] < len(is_bad)] == rows and len(rows) >= len(bad)
    for index, (what, (_, word)) in zip(indices, bad.items()):
        reason = input_pipeline.why_bad(source, index)
        assert word in reason and '\n' not in reason and '{{' not in reason, (what, reason)
    # The same on each run, and for any number of shards.
    for num_shards in (1, 2):
        again, told_again = stream(source, evaluation, num_shards)
        for key in found:
            np.testing.assert_array_equal(again[key], found[key])
        assert [entry for entry in told_again if entry[0] < len(is_bad)] == rows
    # KiB; a bomb would take ten times that.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000


@pytest.mark.parametrize('kind', ['tfrecord', 'arrayrecord'])
def test_records_with_a_wrong_checksum_or_label(tmp_path, good, write_tfrecords, write_arrayrecords, kind):
    labels = [i % CLASSES + 1 for i in range(COUNT)]
    sources = []
    for name, wrong in (('whole', {}), ('damaged', {20: CLASSES + 1, 31: 0})):
        directory = tmp_path / name
        directory.mkdir()
        for split, changed in (('train', {}), ('validation', wrong)):
            examples = [(image, changed.get(i, label)) for i, (image, label) in enumerate(zip(good, labels))]
            if kind == 'tfrecord':
                write_tfrecords(directory, split, examples, 2)
            else:
                write_arrayrecords(directory, split, examples, 2, 'group_size:1,uncompressed')
        path = next(directory.glob('validation-00000-*'))
        content = path.read_bytes()
        if name == 'damaged':  # a bit in the middle of an image, where a decoder would not notice it
            at = content.index(good[4]) + len(good[4]) // 2
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
        sources.append(input_pipeline.open_source(kind, directory, 'validation'))
    (wanted, _), (found, told) = (stream(source) for source in sources)
    is_bad = np.isin(found['index'], [4, 20, 31])
    np.testing.assert_array_equal(found['mask'], ~is_bad)
    assert {index for _, index in told} == {4, 20, 31}
    for key in ('image', 'label', 'index'):
        np.testing.assert_array_equal(found[key][~is_bad], wanted[key][~is_bad])
    assert 'labels are out of range: this is class 3 counted from 0' in input_pipeline.why_bad(sources[1], 20)
    assert 'labels are out of range: this is class -1 counted from 0' in input_pipeline.why_bad(sources[1], 31)
    assert input_pipeline.why_bad(sources[1], 4)


def test_labels_that_are_wrong_altogether_are_refused(tmp_path, good, write_tfrecords, write_arrayrecords):
    for kind, writer in (('tfrecord', write_tfrecords), ('arrayrecord', write_arrayrecords)):
        directory = tmp_path / kind
        directory.mkdir()
        writer(directory, 'train', [(image, i % 3) for i, image in enumerate(good)])
        writer(directory, 'validation', [(image, i % 30) for i, image in enumerate(good)])
        with pytest.raises(input_pipeline.DataError, match='labels are out of range'):
            input_pipeline.open_source(kind, directory, 'validation')
