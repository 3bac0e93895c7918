"""The index of TFRecord shards: where the encoded image of each record lies, and its label.

The index points at the image bytes inside the record, so that reading an example is one ranged read and no parsing.
Checked when it is made: the masked CRC of every record's length, that every record ends inside its file, that every
record holds one image and one label. Not checked: the CRC of the payload, which would mean reading every byte; a
damaged image shows when it is decoded.
"""
import mmap
import os
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from input_pipeline.sources.index_cache import cached_array
from input_pipeline.sources.source import DataError


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
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        records = _find_records(path, buffer)
        rows = np.empty((len(records), 3), np.int64)
        for i, (start, length, _) in enumerate(records):
            try:
                rows[i] = find_image_and_label(buffer, start, start + length, image_key, label_key)
            except (ValueError, IndexError) as error:
                raise DataError(f'{path}, record {i}: {error}') from error
    return rows


def _find_records(path: str, buffer: mmap.mmap) -> list[tuple[int, int, int]]:
    """Start and length of each payload, and the CRC. A record is length u64, its CRC u32, payload, its CRC u32."""
    records, at = [], 0
    while at + 12 <= len(buffer):
        length, length_crc = struct.unpack_from('<QI', buffer, at)
        records.append((at + 12, length, length_crc))
        at += 16 + length
    _, lengths, crcs = np.array(records, np.uint64).reshape(-1, 3).T
    wrong = np.flatnonzero(masked_crc32c(lengths) != crcs)
    if len(wrong):
        raise DataError(f'{path}, record {wrong[0]} at byte {records[wrong[0]][0] - 12}: the checksum of its length is '
                        'wrong; the file is damaged, compressed or no TFRecord: copy or write it again')
    if at != len(buffer):
        raise DataError(f'{path} ends in the middle of record {max(len(records) - 1, 0)}: it was cut off at '
                        f'{len(buffer)} bytes; copy or write it again')
    return records


def masked_crc32c(lengths: np.ndarray) -> np.ndarray:
    """TFRecord's masked CRC-32C of each length as eight little-endian bytes; uint64 [n] -> uint32 [n]."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    crc = np.full(len(lengths), 0xFFFFFFFF, np.uint32)
    for byte in lengths.astype('<u8').view(np.uint8).reshape(-1, 8).T:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)


def find_image_and_label(buffer: bytes | mmap.mmap, start: int, end: int, image_key: bytes,
                         label_key: bytes) -> tuple[int, int, int]:
    """Walks the tf.train.Example at buffer[start:end]; ValueError if it is none or lacks one of the two features.

    Returns offset in `buffer` and length of the one value of feature `image_key`, and the one value of `label_key`.
    """
    image, label, seen = None, None, []
    for _, features_start, features_end in _fields(buffer, start, end):
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


def _single(buffer: bytes | mmap.mmap, feature: tuple[int, int], kind: int, key: bytes) -> tuple[int, int]:
    """Span of the one value in a Feature that must be of `kind` (1 bytes_list, 3 int64_list)."""
    for number, list_start, list_end in _fields(buffer, *feature):
        values = list(_fields(buffer, list_start, list_end)) if number == kind else []
        if len(values) == 1:
            return values[0][1:]
    raise ValueError(f'feature {key.decode()!r} is not one {"string of bytes" if kind == 1 else "integer"}')


def _varint(buffer: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(buffer: bytes | mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
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
