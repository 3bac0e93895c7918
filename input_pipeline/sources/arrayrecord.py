"""ArrayRecord shards as a source, through array_record's own random access."""
from collections.abc import Sequence

import numpy as np

from input_pipeline.sources.index_cache import cached_array
from input_pipeline.sources.record_index import NO_LABEL, find_image_and_label
from input_pipeline.sources.source import DataError, Source
from input_pipeline.sources.tfrecord import IMAGE_KEY, LABEL_KEY, find_shards, label_rule

_SUFFIX = '.array_record'


def open_arrayrecord(data_dir: str, split: str) -> Source:
    """Opens DATA_DIR/<split>-?????-of-?????.array_record; records, labels and errors as `tfrecord.open_tfrecord`."""
    def load_labels(split):
        paths = find_shards(data_dir, split, _SUFFIX)

        def build():
            # The classes are not known yet: any label is let through, and the rule looks at them all.
            everything = make_record_source(f'{split} of {data_dir}', paths, IMAGE_KEY, LABEL_KEY, range(1 << 31))
            return np.array([label if image else NO_LABEL for image, label in everything], np.int64)

        return cached_array(paths, split + _SUFFIX, f'{IMAGE_KEY} {LABEL_KEY}', build)

    first, class_names = label_rule(load_labels(split), load_labels, data_dir, split, _SUFFIX)
    return make_record_source(f'arrayrecord {split} of {data_dir}', find_shards(data_dir, split, _SUFFIX), IMAGE_KEY,
                              LABEL_KEY, class_names, first)


def make_record_source(name: str, shards: Sequence, image_key: str, label_key: str, class_names: Sequence[str],
                       first: int = 0) -> Source:
    """Source over shards: paths, or objects with filename, skip, take, examples_in_shard. `first`: class 0's label."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource  # only this format needs it
    try:
        records = ArrayRecordDataSource(list(shards))
    except RuntimeError as error:
        raise DataError(f'{name} cannot be read: {" ".join(str(error).split())}; copy or write it again') from error

    def load(i):
        try:
            record = records[i]
            offset, length, label = find_image_and_label(record, image_key, label_key)
        except (RuntimeError, ValueError) as error:
            return b'', 0, ' '.join(str(error).split())
        if not 0 <= label - first < len(class_names):
            return b'', 0, f'labels are out of range: this is class {label - first} counted from 0'
        return record[offset:offset + length], label - first, ''

    def read(indices):
        loaded = [load(i) for i in indices.tolist()]
        return [image for image, _, _ in loaded], np.array([label for _, label, _ in loaded], np.int32)

    return Source(name, len(records), class_names, read, lambda i: f'{name} (record {i} of {len(records)})',
                  lambda i: load(int(i))[2])
