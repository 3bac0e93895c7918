"""Two processes compute what one does, one of them writes, and none outlives a peer that is lost or hangs for long.

What takes minutes runs where LONG_TESTS is set:

    LONG_TESTS=1 ./launch/test.sh tests/end_to_end/test_multi_worker.py
"""

import functools
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import few_blocks
import numpy as np
import pytest
import tensorflow as tf
import workdir_reader
from workdir_reader import reports

from trainer import checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_STEPS, ROWS = 20, 64
# Twenty steps of 64 out of the 42 examples of conftest's folder: batches that straddle epochs.
SETTINGS = ('--gin_param=train.epochs=31', f'--gin_param=train.global_batch_size={ROWS}',
            f'--gin_param=train.max_steps={NUM_STEPS}', '--gin_param=train.eval_every_epochs=16',
            '--gin_param=train.ema_decay=0.9', '--gin_param=train.step_timeout_secs=300')
# So small a rate, because the gradient of the untrained network jumps by 1e-3 wherever rounding moves a ReLU over its
# kink: at those of real training one device whose weights are moved by 1e-7 is soon 1e-3 from itself.
SYNCHRONISED = ('--gin_param=train.sync_batch_norm=True', '--gin_param=cosine.peak_rate=1e-4',
                '--gin_param=train_dataset.image_size=64', '--gin_param=eval_dataset.image_size=64',
                '--gin_param=eval_dataset.resize=72')
MIRRORED = ("--gin_param=build_strategy.name='mirrored'", '--gin_param=build_strategy.num_devices=2')
SAVED_EACH_STEP = ('--gin_param=train.checkpoint_every_steps=1', '--gin_param=train.keep_checkpoints=20')
ONE_THREAD = ('--gin_param=build_strategy.op_threads=1',)
ENDLESS = ('--gin_param=train.epochs=100000', '--gin_param=train.eval_every_epochs=100000')
TIMEOUT_SECS = 8


@pytest.fixture
def start_workers(start, recipe, folder, tmp_path):
    """start_workers(*flags, workdirs=, own=, NAME=) -> two workers of one run, as of `start`; none is left behind."""
    started = []

    def start_(*flags, workdirs=(tmp_path / 'run',) * 2, own=((), ()), **how):
        sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(2)]
        addresses = [f'127.0.0.1:{each.getsockname()[1]}' for each in sockets]
        for each in sockets:
            each.close()
        for index, workdir in enumerate(workdirs):
            started.append(start(f'--gin_file={recipe}', '--gin_file=gin/hardware/multi_worker.gin', *SETTINGS,
                                 f'--data_dir={folder}', f'--workdir={workdir}', f'--workers={",".join(addresses)}',
                                 f'--worker_index={index}', *flags, *own[index], **how))
        return started[-2:]

    yield start_
    for process in started:
        process.kill()
        process.communicate()


def finish(processes):
    """[(exit code, stderr)], for all of them together."""
    results = [process.communicate(timeout=240) for process in processes]
    return [(process.returncode, stderr) for process, (_, stderr) in zip(processes, results)]


def assert_finished(processes):
    for code, stderr in finish(processes):
        assert code == 0, stderr


def tensors(workdir, step=NUM_STEPS):
    return workdir_reader.tensors(workdir, step)


def relative_difference(values, others, prefix):
    a, b = (np.concatenate([np.ravel(v).astype(np.float64) for name, v in tensors.items() if name.startswith(prefix)])
            for tensors in (values, others))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def wait_for_checkpoint(workdir, processes):
    deadline = time.monotonic() + 300  # only to end at all: nothing is said of how long it takes
    while not list(workdir.glob('checkpoints/ckpt-*')):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.2)


@pytest.fixture(scope='module')
def reference(tmp_path_factory, run, recipe, folder):
    """reference(*flags) -> the workdir of a finished run in one process, to be read by all tests."""
    @functools.cache
    def reference_(*flags):
        workdir = tmp_path_factory.mktemp('reference')
        finished = run(f'--gin_file={recipe}', *SETTINGS, f'--data_dir={folder}', f'--workdir={workdir}', *flags,
                       command=few_blocks.COMMAND)
        assert finished.returncode == 0, finished.stderr
        return workdir

    return reference_


@pytest.mark.parametrize(('flags', 'num_steps'), [
    (('--gin_param=train.max_steps=4',), 4), pytest.param(SYNCHRONISED, NUM_STEPS, marks=pytest.mark.long)])
def test_two_workers_equal_two_replicas_in_every_bit(flags, num_steps, start_workers, reference, tmp_path):
    """At equal threads a replica."""
    assert_finished(start_workers(*flags, *ONE_THREAD, command=few_blocks.COMMAND))
    workers = tensors(tmp_path / 'run', num_steps)
    replicas = tensors(reference(*flags, *ONE_THREAD, *MIRRORED), num_steps)
    assert workers.keys() == replicas.keys()
    for name in workers:
        np.testing.assert_array_equal(workers[name], replicas[name], err_msg=name)


@pytest.fixture(scope='module')
def rounded(tmp_path_factory, run, recipe, folder):
    """rounded(seed, *flags) -> the workdir of a run in one process that shows what rounding alone makes of it.

    Its weights are moved by half a unit in the last place before the first update.
    """
    @functools.cache
    def rounded_(seed, *flags):
        workdir = tmp_path_factory.mktemp('rounded')
        command = (f'--gin_file={recipe}', *SETTINGS, f'--data_dir={folder}', f'--workdir={workdir}', *flags)
        first = run(*command, '--gin_param=train.max_steps=1')
        assert first.returncode == 0, first.stderr
        lines = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
        (workdir / 'metrics.jsonl').write_text(''.join(line for line in lines if 'eval/' not in line))
        rng = np.random.default_rng(seed)
        moved = {name: value * (1 + 6e-8 * rng.choice([-1, 1], value.shape)).astype(np.float32)
                 if name.startswith('params/') else value for name, value in tensors(workdir, 1).items()}
        meta = json.loads((workdir / 'checkpoints/ckpt-00000001/meta.json').read_text())
        del meta['step'], meta['sha256']
        checkpoint.save(workdir / 'checkpoints', 1, {name: tf.Variable(value) for name, value in moved.items()}, meta,
                        keep=1)
        rest = run(*command)
        assert rest.returncode == 0 and 'resuming from' in rest.stderr, rest.stderr
        return workdir

    return rounded_


@pytest.mark.long
@pytest.mark.parametrize('who', ['two workers', 'two replicas', 'four replicas'])
def test_any_number_of_replicas_computes_what_one_device_does(who, start_workers, reference, rounded, tmp_path):
    """Parameters within 1e-5 after twenty steps, and all else as near as a run with other rounding is."""
    flags = (*SYNCHRONISED, *ONE_THREAD, *SAVED_EACH_STEP)
    if who == 'two workers':
        assert_finished(start_workers(*flags))
        workdir = tmp_path / 'run'
    else:
        workdir = reference(*flags, MIRRORED[0], f'--gin_param=build_strategy.num_devices={2 if "two" in who else 4}')
    of_one = reference(*flags)
    one = tensors(of_one)
    assert one['step'] == NUM_STEPS and one['position'] == NUM_STEPS * ROWS
    moved = relative_difference(tensors(of_one, 1), one, 'params/')  # by all steps, in the first of which the rate is 0
    assert moved > 5e-5 and relative_difference(tensors(workdir), one, 'params/') < min(1e-5, 0.2 * moved)
    assert relative_difference(tensors(workdir, 1), tensors(of_one, 1), 'params/') == 0
    assert relative_difference(tensors(workdir, 1), tensors(of_one, 1), 'batch_stats/') < 1e-6
    for step, kind in itertools.product(range(2, 5), ('params/', 'batch_stats/', 'ema/')):  # rounding has not grown yet
        assert relative_difference(tensors(workdir, step), tensors(of_one, step), kind) < 1e-5, (step, kind)
    assert (workdir / 'best').is_dir() and (workdir / 'config.gin').is_file()

    def distances(workdir):
        """How far from `one` each kind of tensor is in the end, and each metric at most."""
        far = {kind: relative_difference(tensors(workdir), one, kind) for kind in ('batch_stats/', 'slots/', 'ema/')}
        for line, line_of_one in zip(reports(workdir), reports(of_one), strict=True):
            assert line.keys() == line_of_one.keys()
            for tag, value in line_of_one.items():
                far[tag] = max(far.get(tag, 0), abs(line[tag] - value) / (1 if 'top' in tag else abs(value) or 1))
        return far

    of_rounding = [distances(rounded(seed, *flags)) for seed in (1, 2)]
    for name, distance in distances(workdir).items():
        print(f'{who}: {name} {distance:.2g}, of rounding {[float(f"{each[name]:.2g}") for each in of_rounding]}')
        one_example = 1 / 20 if 'top' in name else 0  # of the 21 that are evaluated, or of the 64 of a step
        assert distance <= 3 * max(each[name] for each in of_rounding) + one_example, name
        assert distance < 1e-3 or not name.endswith('/loss')


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_workers(start_workers, reference, run, recipe, folder, tmp_path):
    """1 -> 2 -> 1 workers; the stream of examples and, with synchronised statistics, the curve stay the same."""
    workdir = tmp_path / 'run'
    flags = (*SYNCHRONISED, *ONE_THREAD)
    first = run(f'--gin_file={recipe}', *SETTINGS, *flags, f'--data_dir={folder}', f'--workdir={workdir}',
                '--gin_param=train.max_steps=7')
    assert first.returncode == 0, first.stderr
    results = finish(start_workers(*flags, '--gin_param=train.max_steps=14'))
    assert [code for code, _ in results] == [0, 0], results
    assert 'resuming from' in results[0][1] and 'num_replicas was 1, is 2' in results[0][1]
    last = run(f'--gin_file={recipe}', *SETTINGS, *flags, f'--data_dir={folder}', f'--workdir={workdir}')
    assert last.returncode == 0 and 'num_replicas was 2, is 1' in last.stderr, last.stderr
    whole = tensors(reference(*flags))
    resumed = tensors(workdir)
    assert resumed['position'] == whole['position']
    assert relative_difference(resumed, whole, 'params/') < 1e-5


@pytest.mark.parametrize('way', [pytest.param(signal.SIGKILL, id='killed'),
                                 pytest.param(signal.SIGSTOP, id='stopped', marks=pytest.mark.long)])
def test_a_lost_worker_is_named_and_the_same_command_resumes(way, start_workers, tmp_path):
    workdir = tmp_path / 'run'
    timeout = f'--gin_param=build_strategy.timeout_secs={TIMEOUT_SECS}'
    command = few_blocks.COMMAND
    first, second = start_workers(timeout, *ENDLESS, '--gin_param=train.max_steps=None', command=command)
    wait_for_checkpoint(workdir, [first, second])
    second.send_signal(way)
    lost = time.monotonic()
    _, stderr = first.communicate(timeout=120)
    assert first.returncode == 75, stderr
    assert time.monotonic() - lost < 30
    assert [line for line in stderr.splitlines() if line.startswith('error: ')] == stderr.splitlines()[-1:]
    assert 'worker 1 (127.0.0.1:' in stderr.splitlines()[-1] and 'run the same command again' in stderr
    second.kill()
    if way == signal.SIGSTOP:
        return  # what is left behind is the same
    saved = max(int(path.name[5:]) for path in workdir.glob('checkpoints/ckpt-*'))
    results = finish(start_workers(timeout, *ENDLESS, f'--gin_param=train.max_steps={saved + 3}', command=command))
    assert [code for code, _ in results] == [0, 0], results
    assert 'resuming from' in results[0][1]
    assert tensors(workdir, saved + 3)['step'] == saved + 3


def test_a_signal_to_one_worker_stops_all_at_the_same_step(start_workers, tmp_path):
    processes = start_workers(*ENDLESS, '--gin_param=train.max_steps=None', command=few_blocks.COMMAND)
    wait_for_checkpoint(tmp_path / 'run', processes)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _ in results] == [42, 42], results
    steps = [re.search(r'stopped at step (\d+) of', stderr)[1] for _, stderr in results]
    assert steps[0] == steps[1] and tensors(tmp_path / 'run', int(steps[0]))['step'] == int(steps[0])


def test_a_worker_that_does_not_come_is_named(start, recipe, folder, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as one, socket.create_server(('127.0.0.1', 0)) as other:
        addresses = [f'127.0.0.1:{each.getsockname()[1]}' for each in (one, other)]
    common = (f'--gin_file={recipe}', '--gin_file=gin/hardware/multi_worker.gin', f'--data_dir={folder}',
              f'--workdir={tmp_path / "run"}', f'--workers={",".join(addresses)}')
    late, waiting = (start(*common, f'--worker_index={index}', f'--gin_param=build_strategy.timeout_secs={secs}')
                     for index, secs in ((0, 3), (1, 300)))
    waiting.send_signal(signal.SIGSTOP)  # as if it had not been started
    _, stderr = late.communicate(timeout=60)
    assert late.returncode == 75, stderr
    assert f'worker 1 ({addresses[1]}) did not come within build_strategy.timeout_secs = 3' in stderr.splitlines()[-1]
    waiting.send_signal(signal.SIGCONT)
    while 'workdir' not in waiting.stderr.readline():
        pass
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(timeout=60) == 42
    assert not (tmp_path / 'run').exists()


@pytest.mark.long
def test_a_late_worker_is_waited_for_and_one_of_another_recipe_is_refused(start_workers, tmp_path):
    first, second = start_workers('--gin_param=train.max_steps=4')
    second.send_signal(signal.SIGSTOP)
    time.sleep(15)
    second.send_signal(signal.SIGCONT)
    assert_finished([first, second])
    before = {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}
    (code, _), (other_code, stderr) = finish(start_workers(
        f'--gin_param=build_strategy.timeout_secs={TIMEOUT_SECS}', own=((), ('--gin_param=sgd.momentum=0.8',))))
    assert (code, other_code) == (75, 2)
    assert 'was started with another recipe than worker 0' in stderr.splitlines()[-1]
    assert {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()} == before


@pytest.mark.long
def test_workers_that_do_not_share_the_workdir_are_refused(start_workers, run, recipe, folder, tmp_path):
    done = run(f'--gin_file={recipe}', *SETTINGS, f'--data_dir={folder}', f'--workdir={tmp_path / "a"}',
               '--gin_param=train.max_steps=4')
    assert done.returncode == 0, done.stderr
    (code, _), (other_code, stderr) = finish(start_workers(
        f'--gin_param=build_strategy.timeout_secs={TIMEOUT_SECS}', workdirs=(tmp_path / 'a', tmp_path / 'b')))
    assert other_code == 2 and code == 75
    assert 'cannot read' in stderr and 'ckpt-00000004, which worker 0 takes' in stderr and 'all workers share' in stderr
    assert not (tmp_path / 'b').exists()


@pytest.mark.long
def test_the_launcher_runs_real_workers_and_resumes_after_one_was_killed(reference, recipe, folder, tmp_path):
    """A worker that is killed is a crash, for a human to look at; the same command, given again, resumes."""
    flags = (*SYNCHRONISED, *ONE_THREAD)
    workdir, venv = tmp_path / 'run', tmp_path / 'venv'
    (venv / 'bin').mkdir(parents=True)
    (venv / 'bin/python').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (venv / 'bin/python').chmod(0o755)
    environment = {**os.environ, 'VENV': str(venv)}
    mark_installed = 'source launch/environment.sh; fingerprint >"$(stamp "")"'
    subprocess.run(['bash', '-c', mark_installed], cwd=REPOSITORY, env=environment, check=True)

    def launch():
        return subprocess.Popen(
            ['launch/multi_worker.sh', '--workers=2', '--', f'--gin_file={recipe}',
             '--gin_file=gin/hardware/multi_worker.gin', *SETTINGS, *flags, f'--data_dir={folder}',
             f'--workdir={workdir}', f'--gin_param=build_strategy.timeout_secs={TIMEOUT_SECS}'],
            cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    launcher = launch()
    wait_for_checkpoint(workdir, [launcher])
    workers = subprocess.run(['pgrep', '-f', f'trainer.main.*--workdir={workdir}'], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    _, stderr = launcher.communicate(timeout=120)
    assert launcher.returncode == 1 and 'error: ' in stderr and 'worker 1 (127.0.0.1:' in stderr, stderr
    launcher = launch()
    _, stderr = launcher.communicate(timeout=240)
    assert launcher.returncode == 0 and 'resuming from' in stderr, stderr
    resumed, whole = tensors(workdir), tensors(reference(*flags, *MIRRORED))
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)
