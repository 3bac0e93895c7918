"""The newest checkpoint is damaged: that is found and named, the one before is taken, and nothing comes of it."""

import logging
import os
import shutil

import keras
import numpy as np
import pytest
from step_harness import CLASSES, small_network
from workdir_reader import assert_equal_bits, reports

import trainer

NUM_STEPS, BATCH = 12, 8
DATA = 'state.data-00000-of-00001'


def fit(workdir):
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (NUM_STEPS * BATCH, 32, 32, 3), np.uint8), rng.integers(0, CLASSES, 96)
    return trainer.train(small_network(), images, labels, epochs=1, global_batch_size=BATCH, workdir=workdir,
                         peak_rate=0.01, warmup_epochs=0, checkpoint_every_steps=4, log_every_steps=1, ema_decay=0.9)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole')
    fit(workdir)
    return workdir


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(('name', 'damage'), [
    pytest.param(DATA, lambda path: os.truncate(path, path.stat().st_size // 2), id='data-truncated'),
    pytest.param('meta.json', flip, id='bit-in-meta'),
    pytest.param(DATA, flip, id='bit-in-data'),
    pytest.param('state.index', flip, id='bit-in-index'),
    pytest.param('state.index', lambda path: os.truncate(path, 0), id='index-empty'),
    pytest.param('meta.json', lambda path: os.truncate(path, 0), id='meta-empty'),
    pytest.param(DATA, os.remove, id='data-missing'),
    pytest.param('meta.json', os.remove, id='meta-missing')])
def test_the_one_before_is_taken(whole, tmp_path, caplog, name, damage):
    workdir = tmp_path / 'work'
    shutil.copytree(whole, workdir)
    damage(workdir / 'checkpoints' / f'ckpt-{NUM_STEPS:08d}' / name)
    caplog.set_level(logging.INFO)
    fit(workdir)
    assert f'ckpt-{NUM_STEPS:08d} is damaged ({name}' in caplog.text
    assert 'resuming from' in caplog.text and f'ckpt-{NUM_STEPS - 4:08d}' in caplog.text
    assert_equal_bits(workdir, whole)
    assert reports(workdir) == reports(whole)
