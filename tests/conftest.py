"""Small data sets and recipes, the command in a process of its own, and four logical CPUs for replicas."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

# An assertion in a module that tests share shows its values, as one in a test does.
pytest.register_assert_rewrite('workdir_reader', *(path.stem for path in Path(__file__).parent.rglob('*_harness.py')))

# Four logical CPUs, for the tests with replicas: once for the process, and before anything starts TensorFlow.
tf.config.set_logical_device_configuration(tf.config.list_physical_devices('CPU')[0],
                                           [tf.config.LogicalDeviceConfiguration()] * 4)
tf.config.list_logical_devices()

REPOSITORY = Path(__file__).resolve().parents[1]
# As many classes as examples of `folder_recipe` need, at the smallest width and size that still run every layer.
RECIPE = """
data.name = 'folder'
ghostnet.num_classes = 4
ghostnet.width = 0.25
train.epochs = 2.5
train.global_batch_size = 8
train.label_smoothing = 0.1
sgd.nesterov = True
sgd.weight_decay = 4e-5
cosine.peak_rate = 0.05
cosine.warmup_epochs = 0.5
train_dataset.image_size = 32
eval_dataset.image_size = 32
eval_dataset.resize = 36
train.steps_per_loop = 3
train.log_every_steps = 1
train.checkpoint_every_steps = 4
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked long wait for LONG_TESTS."""
    if not os.environ.get('LONG_TESTS'):
        for item in items:
            if item.get_closest_marker('long'):
                item.add_marker(pytest.mark.skip(reason='takes too long for every day: LONG_TESTS=1'))


@pytest.fixture(scope='session')
def make_folder() -> Callable[[Path], Path]:
    """make_folder(directory): DATA_DIR of 42 training and 21 validation JPEGs of four classes, told apart by colour."""
    def make(directory):
        rng = np.random.default_rng(7)
        for split, count in (('train', 42), ('validation', 21)):
            for i in range(count):
                image = rng.integers(0, 120, (36 + i % 5, 44 - i % 7, 3), np.uint8)
                image[..., :3] += np.array([[130, 0, 0], [0, 130, 0], [0, 0, 130], [100, 100, 0]], np.uint8)[i % 4]
                path = directory / split / 'abcd'[i % 4] / f'{i:03d}.jpg'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path, quality=90)
        return directory

    return make


@pytest.fixture(scope='session')
def folder(tmp_path_factory, make_folder) -> Path:
    """One such DATA_DIR, only to be read."""
    return make_folder(tmp_path_factory.mktemp('folder'))


@pytest.fixture(scope='session')
def recipe(tmp_path_factory) -> Path:
    """A gin file that trains GhostNet 0.25 for 13 steps of 8 on `folder`, 5.25 steps an epoch."""
    path = tmp_path_factory.mktemp('recipe') / 'tiny.gin'
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope='session')
def start() -> Callable[..., subprocess.Popen]:
    """start(*flags, command=..., cwd=..., NAME=...): the trainer in a process of its own, from any directory."""
    def start_(*flags, command=(sys.executable, '-m', 'trainer.main'), cwd=REPOSITORY, **variables):
        environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY), **variables}
        return subprocess.Popen([*command, *map(str, flags)], cwd=cwd, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start_


@pytest.fixture(scope='session')
def run(start) -> Callable[..., subprocess.CompletedProcess]:
    """run(*flags, command=..., cwd=...): the same, to its end."""
    def run_(*flags, **where):
        process = start(*flags, **where)
        stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run_


@pytest.fixture(scope='session')
def snapshot() -> Callable[[Path], dict]:
    """snapshot(directory) -> {path: (time of the last change, hash)} of everything in it; {} if it is not there."""
    def take(directory):
        return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.is_file() and
                                                   hashlib.sha256(path.read_bytes()).hexdigest())
                for path in sorted([directory, *directory.rglob('*')]) if path.exists()}

    return take
