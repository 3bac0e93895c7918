"""The threads that decode: errors come back, and a program may end whenever it likes."""

import subprocess
import sys
from pathlib import Path

import pytest

from input_pipeline import threads

ROOT = Path(__file__).resolve().parents[2]


def test_every_item_is_seen_once():
    seen = []
    threads.for_each(seen.append, range(1000))
    assert sorted(seen) == list(range(1000))


def test_an_error_comes_back_when_nothing_runs_any_more():
    seen = []

    def fail_at_seven(item):
        seen.append(item)
        if item == 7:
            raise OSError('the disk is gone')

    with pytest.raises(OSError, match='the disk is gone'):
        threads.for_each(fail_at_seven, range(200))
    assert len(seen) == 200


def test_threads_that_cannot_be_started_are_an_error(monkeypatch):
    """Or what they should have read would be whatever the memory held."""
    class Full:
        def submit(self, function, item):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, '_POOL', Full())
    with pytest.raises(RuntimeError, match='new thread'):
        threads.for_each(print, range(3))
    assert threads._callers == []


@pytest.mark.parametrize('num_batches', [0, 1, 5])
def test_a_program_that_ends_amid_reading_ends_quietly(num_batches):
    program = f"""
import numpy as np
import input_pipeline
images = np.random.default_rng(0).integers(0, 256, [300, 64, 64, 3], np.uint8)
source = input_pipeline.array_source(images, np.zeros(300, np.int64))
datasets = [input_pipeline.train_dataset(source, global_batch_size=size, image_size=96) for size in (16, 200)]
iterators = [iter(dataset) for dataset in datasets]
for _ in range({num_batches}):
    for iterator in iterators:
        next(iterator)
"""
    run = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert 'terminate' not in run.stderr and 'Traceback' not in run.stderr and 'RuntimeError' not in run.stderr
