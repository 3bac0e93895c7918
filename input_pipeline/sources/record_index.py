"""The index of TFRecord shards: where the encoded image of each record lies, and its label.

The index points at the image bytes inside the record, so that reading an example is one ranged read and no parsing.
Checked when it is made: that every record ends inside its file, has the checksums it was written with, and holds one
image and one label. A record whose payload has another checksum has no label here; all else that is wrong is refused.
"""
import mmap
import os
import struct
from collections.abc import Iterator, Sequence

import google_crc32c
import numpy as np

from input_pipeline.sources.index_cache import cached_array
from input_pipeline.sources.source import DataError

NO_LABEL = np.iinfo(np.int64).min  # of a damaged record


def load_record_index(paths: Sequence[str], name: str, image_key: str, label_key: str) -> np.ndarray:
    """int64 [n, 4], of each record: its shard in `paths`, offset and length in bytes of its image, its label as stored.

    From the cache, or made now and cached under `name`. Raises DataError if a shard is damaged, compressed or
    truncated, or a record lacks one of the two features.
    """
    def build():
        return np.concatenate([np.insert(index_shard(path, image_key.encode(), label_key.encode()), 0, shard, axis=1)
                               for shard, path in enumerate(paths)])

    return cached_array(paths, name, f'{image_key} {label_key}', build)


def index_shard(path: str, image_key: bytes, label_key: bytes) -> np.ndarray:
    """int64 [n, 3]: offset and length of the image bytes in the file, and the label, of each record of one shard."""
    if os.path.getsize(path) == 0:
        return np.zeros((0, 3), np.int64)
    rows, at = [], 0
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        # A record is length u64, its CRC u32, payload, its CRC u32.
        while at + 12 <= len(buffer):
            length, crc = struct.unpack_from('<QI', buffer, at)
            if masked_crc32c(buffer[at:at + 8]) != crc:
                raise DataError(f'{path}, record {len(rows)} at byte {at}: the checksum of its length is wrong; the '
                                'file is damaged, compressed or no TFRecord: copy or write it again')
            start, at = at + 12, at + 16 + length
            if at > len(buffer):
                break
            payload = buffer[start:at - 4]
            if masked_crc32c(payload) != struct.unpack_from('<I', buffer, at - 4)[0]:
                rows.append((start, 0, NO_LABEL))
                continue
            try:
                offset, size, label = find_image_and_label(payload, image_key, label_key)
            except (ValueError, IndexError) as error:
                raise DataError(f'{path}, record {len(rows)}: {error}') from error
            rows.append((start + offset, size, label))
        if at != len(buffer):
            raise DataError(f'{path} ends in the middle of record {len(rows)}: it was cut off at {len(buffer)} bytes; '
                            'copy or write it again')
    return np.array(rows, np.int64).reshape(-1, 3)


def masked_crc32c(data: bytes) -> int:
    """TFRecord's masked CRC-32C."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def find_image_and_label(buffer: bytes, image_key: bytes, label_key: bytes) -> tuple[int, int, int]:
    """Walks a tf.train.Example; ValueError if it is none or lacks one of the two features.

    Returns offset in `buffer` and length of the one value of feature `image_key`, and the one value of `label_key`.
    """
    image, label, seen = None, None, []
    for _, features_start, features_end in _fields(buffer, 0, len(buffer)):
        for _, entry_start, entry_end in _fields(buffer, features_start, features_end):
            key, feature = b'', (0, 0)
            for number, value_start, value_end in _fields(buffer, entry_start, entry_end):
                if number == 1:
                    key = buffer[value_start:value_end]
                elif number == 2:
                    feature = value_start, value_end
            if key == image_key:
                image = _single(buffer, feature, 1, image_key)
            elif key == label_key:
                at, stop = _single(buffer, feature, 3, label_key)
                label, at = _varint(buffer, at)
                if at != stop:
                    raise ValueError(f'feature {label_key.decode()!r} holds more than one value')
            if image and label is not None:
                return image[0], image[1] - image[0], label - (1 << 64) if label >> 63 else label
            seen.append(key.decode(errors='replace'))
    missing = image_key if image is None else label_key
    raise ValueError(f'no feature {missing.decode()!r}; the record has: {", ".join(sorted(seen)) or "none"}')


def _single(buffer: bytes, feature: tuple[int, int], kind: int, key: bytes) -> tuple[int, int]:
    """Span of the one value in a Feature that must be of `kind` (1 bytes_list, 3 int64_list)."""
    for number, list_start, list_end in _fields(buffer, *feature):
        values = list(_fields(buffer, list_start, list_end)) if number == kind else []
        if len(values) == 1:
            return values[0][1:]
    raise ValueError(f'feature {key.decode()!r} is not one {"string of bytes" if kind == 1 else "integer"}')


def _varint(buffer: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(buffer: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end of the value) of each field of the protocol buffer message at buffer[at:end]."""
    while at < end:
        tag, at = _varint(buffer, at)
        wire_type = tag & 7
        if wire_type == 2:
            length, at = _varint(buffer, at)
            stop = at + length
        elif wire_type == 0:
            stop = _varint(buffer, at)[1]
        else:
            stop = at + {1: 8, 5: 4}.get(wire_type, end)  # any other type ends beyond the message
        if stop > end:
            raise ValueError('the payload is no tf.train.Example')
        yield tag >> 3, at, stop
        at = stop
