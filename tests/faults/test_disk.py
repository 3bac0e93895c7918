"""A disk that is full, read-only, broken or slow: the last good checkpoint stays, training goes on, nothing is lost.

Faults are made by a library that is preloaded into the trainer; a small file system is filled where one may be mounted.
Here the disk is full; all other faults are in the long form:

    LONG_TESTS=1 ./launch/test.sh tests/faults
"""

import contextlib
import errno
import os
import shutil
import subprocess
import time
from pathlib import Path

import few_blocks
import pytest
from workdir_reader import assert_equal_bits, reports, tensors

from trainer import checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
# On conftest's folder: long enough to be watched.
SETTINGS = {'train.epochs': 54, 'train.checkpoint_every_steps': 10, 'train.eval_every_epochs': 40,
            'train.keep_checkpoints': 2}
NUM_STEPS = 283


@pytest.fixture(scope='module')
def shim(tmp_path_factory):
    compiler = shutil.which('cc')
    if compiler is None:
        pytest.skip('no C compiler: disks cannot be made to fail')
    library = tmp_path_factory.mktemp('shim') / 'failing_disk.so'
    subprocess.run([compiler, '-shared', '-fPIC', '-O1', '-o', library, Path(__file__).with_name('failing_disk.c'),
                    '-ldl'], check=True)
    return library


class Run:
    """The trainer in a process of its own, on a disk that can be made to fail."""

    def __init__(self, workdir, recipe, folder, shim=None, **settings):
        self.workdir = workdir
        self.log = workdir.parents[1] / f'{workdir.parent.name}-{workdir.name}.log'  # not on the disk that is filled
        self.control = workdir.with_suffix('.control')
        environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY), 'FAILING_DISK': f'{workdir}/',
                       'FAILING_DISK_CONTROL': str(self.control)}
        if shim:
            environment['LD_PRELOAD'] = str(shim)
        with open(self.log, 'a', encoding='utf-8') as log:
            self.process = subprocess.Popen(
                [*few_blocks.COMMAND, f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={workdir}',
                 *(f'--gin_param={name}={value}' for name, value in {**SETTINGS, **settings}.items())],
                cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=log)

    def said(self):
        return self.log.read_text(encoding='utf-8')

    def wait_until(self, is_so):
        while not is_so():
            assert self.process.poll() is None, self.said()[-2000:]
            time.sleep(0.01)

    def wait_for_checkpoint(self):
        self.wait_until(lambda: checkpoint.list_checkpoints(self.workdir / 'checkpoints'))

    def fail(self, number, delay=0):
        aside = self.control.with_suffix('.aside')
        aside.write_text(f'{number} {delay}')
        aside.rename(self.control)

    def finish(self):
        return self.process.wait(timeout=300)


@pytest.fixture
def start(recipe, folder, tmp_path):
    with contextlib.ExitStack() as stack:
        def start_(name, shim=None, **settings):
            run = Run(tmp_path / name, recipe, folder, shim, **settings)
            stack.callback(run.process.kill)
            return run

        yield start_


@pytest.fixture(scope='module')
def alone(recipe, folder, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp('alone') / 'work', recipe, folder)
    assert run.finish() == 0, run.said()
    assert tensors(run.workdir)['step'] == NUM_STEPS
    return run.workdir


def assert_as_if_nothing_had_been(run, alone):
    assert_equal_bits(run.workdir, alone)
    assert reports(run.workdir) == reports(alone)
    assert not list((run.workdir / 'checkpoints').glob('.writing*'))


@pytest.mark.parametrize('number', [
    pytest.param(errno.ENOSPC, id='full'), pytest.param(errno.EROFS, id='read-only', marks=pytest.mark.long),
    pytest.param(errno.EIO, id='broken', marks=pytest.mark.long)])
def test_a_disk_that_fails_for_a_while(start, shim, alone, number):
    run = start('work', shim)
    run.wait_for_checkpoint()
    run.fail(number)
    run.wait_until(lambda: run.said().count('CANNOT SAVE') >= 1 and 'CANNOT WRITE' in run.said())
    assert checkpoint.latest_valid(run.workdir / 'checkpoints') is not None
    run.control.unlink()
    assert run.finish() == 0, run.said()
    assert os.strerror(number) in run.said() or number == errno.EIO
    assert_as_if_nothing_had_been(run, alone)


def test_a_disk_that_fails_for_too_long(start, shim, alone):
    run = start('work', shim, **{'train.save_retry_secs': 1.0})
    run.wait_for_checkpoint()
    run.fail(errno.ENOSPC)
    assert run.finish() == 1
    last = run.said().splitlines()[-1]
    assert last.startswith('error: nothing could be saved in ') and 'train.save_retry_secs' in last, run.said()
    assert 'Traceback' not in run.said()
    assert checkpoint.latest_valid(run.workdir / 'checkpoints') is not None
    run.control.unlink()
    again = start('work', shim)
    assert again.finish() == 0, again.said()
    assert_as_if_nothing_had_been(again, alone)


@pytest.mark.long
def test_a_slow_disk_does_not_stop_the_steps(start, shim, alone):
    run = start('work', shim)
    run.wait_for_checkpoint()
    run.fail(0, delay=150)
    run.wait_until(lambda: checkpoint.step_of(checkpoint.list_checkpoints(run.workdir / 'checkpoints')[-1]) > 40)
    run.control.unlink()
    assert run.finish() == 0, run.said()
    assert_as_if_nothing_had_been(run, alone)


@pytest.mark.long
def test_a_small_file_system_that_fills_up(start, alone, tmp_path):
    place = tmp_path / 'small'
    place.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=24m', 'tmpfs', place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f'no file system may be mounted here: {mounted.stderr.strip()}')
    try:
        run = start('small/work')
        run.wait_for_checkpoint()
        with contextlib.suppress(OSError), open(place / 'filler', 'wb', buffering=0) as filler:
            while filler.write(bytes(65536)):
                pass
        run.wait_until(lambda: 'CANNOT SAVE' in run.said())
        assert 'No space left on device' in run.said()
        assert checkpoint.latest_valid(run.workdir / 'checkpoints') is not None
        (place / 'filler').unlink()
        assert run.finish() == 0, run.said()
        assert_as_if_nothing_had_been(run, alone)
    finally:
        run.process.kill()
        subprocess.run(['umount', '-l', place], check=True)
