"""The index of TFRecord shards: where the encoded image of each record lies, and its label.

The index points at the image bytes inside the record, so that reading an example is one ranged read and no parsing.
When it is made every record must end inside its file, have right checksums, and hold one image and one label. One whose
payload has another checksum has no label here; all else that is wrong is refused.
"""
import struct
from collections.abc import Sequence
from typing import BinaryIO

import google_crc32c
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from input_pipeline.sources.index_cache import cached_array, in_parallel
from input_pipeline.sources.source import DataError

NO_LABEL = np.iinfo(np.int64).min  # of a damaged record


def load_record_index(paths: Sequence[str], name: str, image_key: str, label_key: str) -> np.ndarray:
    """int64 [n, 4], of each record: its shard in `paths`, offset and length in bytes of its image, its label as stored.

    From the cache, or made now and cached under `name`. Raises DataError if a shard is damaged, compressed or
    truncated, or a record lacks one of the two features.
    """
    def build():
        shards = in_parallel(lambda path: index_shard(path, image_key, label_key), paths)
        return np.concatenate([np.insert(rows, 0, shard, axis=1) for shard, rows in enumerate(shards)])

    return cached_array(paths, name, f'{image_key} {label_key}', build)


def open_shard(path: str, buffer_size: int = 0) -> BinaryIO:
    """A shard, local or remote, for one reader: threads that shared the file would move its position for each other."""
    return tf.io.gfile.GFile(path, 'rb') if '://' in path else open(path, 'rb', buffering=buffer_size)


def index_shard(path: str, image_key: str, label_key: str) -> np.ndarray:
    """int64 [n, 3]: offset and length of the image bytes in the file, and the label, of each record of one shard."""
    rows, at, end = [], 0, tf.io.gfile.stat(path).length
    with open_shard(path, buffer_size=1 << 20) as file:  # twice as fast as three reads from the disk a record
        # A record is length u64, its CRC u32, payload, its CRC u32.
        while at + 12 <= end:
            header = file.read(12)
            length, crc = struct.unpack('<QI', header)
            if masked_crc32c(header[:8]) != crc:
                raise DataError(f'{path}, record {len(rows)} at byte {at}: the checksum of its length is wrong; the '
                                'file is damaged, compressed or no TFRecord: copy or write it again')
            start, at = at + 12, at + 16 + length
            if at > end:
                break
            payload = file.read(length)
            if masked_crc32c(payload) != int.from_bytes(file.read(4), 'little'):
                rows.append((start, 0, NO_LABEL))
                continue
            try:
                offset, size, label = find_image_and_label(payload, image_key, label_key)
            except ValueError as error:
                raise DataError(f'{path}, record {len(rows)}: {error}') from error
            rows.append((start + offset, size, label))
    if at != end:
        raise DataError(f'{path} was cut off in record {len(rows)}, at {end} bytes; copy or write it again')
    return np.array(rows, np.int64).reshape(-1, 3)


def masked_crc32c(data: bytes) -> int:
    """TFRecord's masked CRC-32C."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def find_image_and_label(record: bytes, image_key: str, label_key: str) -> tuple[int, int, int]:
    """Offset and length of the one image in a tf.train.Example, and its label; ValueError if it has not one of each."""
    try:
        features = tf.train.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError('the payload is no tf.train.Example') from error
    present = sorted(features)  # before the look at one that is missing adds it, empty
    images, labels = features[image_key].bytes_list.value, features[label_key].int64_list.value
    for key, values, kind in ((image_key, images, 'string of bytes'), (label_key, labels, 'integer')):
        if key in present and len(values) != 1:
            raise ValueError(f'feature {key!r} {"holds more than one value" if values else f"is not one {kind}"}')
    if missing := [key for key in (image_key, label_key) if key not in present]:
        raise ValueError(f'no feature {missing[0]!r}; the record has: {", ".join(present) or "none"}')
    offset = record.find(images[0][:32])  # to look for all of it takes ten times as long as to parse the record
    while not record.startswith(images[0], offset):
        offset = record.find(images[0][:32], offset + 1)
    return offset, len(images[0]), labels[0]
