"""A source kept in memory reads each example once, and gives what it would give without."""

import collections
import concurrent.futures
import dataclasses
import itertools
import time

import numpy as np
import pytest
from source_harness import assert_holds

import input_pipeline

BAD = 7  # the example that is none


@pytest.fixture
def source(tmp_path, examples, write_tfrecords):
    """23 JPEGs of five classes, of which one record has a wrong checksum."""
    write_tfrecords(tmp_path, 'train', examples, 1)
    path = tmp_path / 'train-00000-of-00001'
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(examples[BAD][0]) + 100] ^= 4
    path.write_bytes(damaged)
    return input_pipeline.open_source('tfrecord', tmp_path, 'train')


@pytest.fixture
def reads(source):
    """How often each example was read from `counted`."""
    return collections.Counter()


@pytest.fixture
def counted(source, reads):
    def read(indices):
        reads.update(indices.tolist())
        return source.read(indices)

    return dataclasses.replace(source, read=read)


def test_each_example_is_read_once_and_only_when_it_is_wanted(source, counted, reads, examples):
    cached = counted.cached()
    assert not reads
    wanted = [(b'', 0) if i == BAD else example for i, example in enumerate(examples)]
    assert cached[3] == wanted[3] and reads == {3: 1}
    for _ in range(2):
        assert_holds(cached, wanted)
    assert reads == dict.fromkeys(range(len(source)), 1)
    assert_holds(counted.cached(), wanted)  # another one has memory of its own
    assert set(reads.values()) == {2}


def test_what_is_said_of_an_example_stays(source, counted):
    cached = counted.cached()
    assert (cached.name, len(cached), cached.class_names) == (source.name, len(source), source.class_names)
    for _ in range(2):
        for i in range(len(source)):
            assert cached.where(i) == source.where(i)
            assert cached.problem(i) == source.problem(i)
            assert input_pipeline.why_bad(cached, i) == input_pipeline.why_bad(source, i)
        assert 'checksum' in input_pipeline.why_bad(cached, BAD)


def test_batches_are_the_same_and_later_epochs_read_nothing(source, counted, reads):
    def batches(of, bad):
        dataset = input_pipeline.train_dataset(of, global_batch_size=8, image_size=24, seed=3, on_bad=lambda *at:
                                               bad.append(at))
        return [{key: x.numpy() for key, x in batch.items()} for batch in itertools.islice(dataset, 12)]

    bad, cached_bad, cached = [], [], counted.cached()
    for batch, cached_batch in zip(batches(source, bad), batches(cached, cached_bad), strict=True):
        for key, value in batch.items():
            assert value.dtype == cached_batch[key].dtype and value.tobytes() == cached_batch[key].tobytes(), key
    # Of the four epochs or more; batches are read ahead, these two not equally far.
    assert {at for at in bad if at[0] < 96} == {at for at in cached_bad if at[0] < 96} and len(bad) >= 4
    assert reads.keys() == set(range(len(source)))
    before = reads.copy()
    batches(cached, [])
    assert reads == before


def test_many_threads_at_once(source, counted, reads, examples):
    def slow(indices):
        time.sleep(0.001)
        return counted.read(indices)

    cached = dataclasses.replace(counted, read=slow).cached()

    def check(seed):
        for indices in np.random.default_rng(seed).integers(0, len(source), (20, 6)):
            encoded, labels = cached.read(indices)
            assert encoded == [b'' if i == BAD else examples[i][0] for i in indices]
            assert labels.tolist() == [0 if i == BAD else examples[i][1] for i in indices]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(40)))
    # Threads that want the same new one at once may each read it; nobody does later.
    assert reads.keys() == set(range(len(source))) and max(reads.values()) <= 8
    before = reads.copy()
    check(99)
    assert reads == before


def test_an_error_of_reading_is_not_kept(counted):
    failing = True

    def read(indices):
        if failing:
            raise OSError('the disk is gone')
        return counted.read(indices)

    cached = dataclasses.replace(counted, read=read).cached()
    with pytest.raises(OSError, match='the disk is gone'):
        cached[2]
    failing = False
    assert cached[2] == counted[2]
