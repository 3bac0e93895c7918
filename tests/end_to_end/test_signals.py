"""A signal ends a run at a whole step with code 42, all of it saved, and the same command ends where it would have."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import few_blocks
import keras
import numpy as np
import pytest
from workdir_reader import CLOCK, assert_equal_bits, reports, tensors

import trainer
from trainer import loop
from trainer.preemption import StoppedEarly

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_STEPS = 160
SLOW = ('--gin_param=train.epochs=31', f'--gin_param=train.max_steps={NUM_STEPS}',
        '--gin_param=train.eval_every_epochs=16')


@pytest.fixture(autouse=True)
def no_signal_is_ignored():
    """A shell starts its background jobs with SIGINT ignored, and what is ignored is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def start_run(folder, recipe, start, tmp_path):
    return lambda *flags: start(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={tmp_path / "run"}', *flags,
                                command=few_blocks.COMMAND)


def wait_for(is_there, process, secs=120):
    deadline = time.monotonic() + secs
    while not is_there():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.005)


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGUSR1])  # SIGINT: below
def test_a_signal_ends_the_run_at_a_step_that_is_saved(sent, start_run, tmp_path):
    run = start_run(*SLOW)
    wait_for((tmp_path / 'run/checkpoints/ckpt-00000004').exists, run)
    run.send_signal(sent)
    stdout, stderr = run.communicate(timeout=60)
    assert (run.returncode, stdout) == (42, ''), stderr
    assert f'{sent.name}: stopping and saving' in stderr and 'Traceback' not in stderr
    step = int(re.search(r'stopped at step (\d+) of 160, and saved: the same command resumes', stderr)[1])
    assert 4 <= step < NUM_STEPS
    assert tensors(tmp_path / 'run')['step'] == step
    if sent == signal.SIGTERM:
        again = start_run(*SLOW)
        assert again.wait(timeout=120) == 0 and f'ckpt-{step:08d}' in again.stderr.read()
        assert tensors(tmp_path / 'run')['step'] == NUM_STEPS


def test_ctrl_c_in_a_terminal(folder, recipe, tmp_path):
    """What the run was spent on takes the place of the bar, and does not stand behind it."""
    in_terminal = 'import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))'
    run = subprocess.Popen([sys.executable, '-c', in_terminal, *few_blocks.COMMAND, f'--gin_file={recipe}', *SLOW,
                            '--gin_param=train.log_every_steps=1000',
                            f'--data_dir={folder}', f'--workdir={tmp_path / "run"}'], stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(REPOSITORY)})
    wait_for((tmp_path / 'run/checkpoints/ckpt-00000004').exists, run)
    written, _ = run.communicate(b'\x03', timeout=60)
    assert run.returncode == 42, written
    shown = [line.rpartition('\r')[2] for line in written.decode().split('\r\n')]
    assert sum(line.startswith('goodput ') for line in shown) == 1, shown
    assert not any('ETA' in line and 'goodput' in line for line in shown), shown


def test_what_takes_long_to_be_dropped_does_not_hold_up_the_end(command, folder, recipe, tmp_path, monkeypatch):
    """As iterators of several replicas, which is longer than a scheduler waits before it kills."""
    happened = []

    class Iterator:
        def __del__(self):
            happened.append('dropped')

    def train(*_, **__):
        batches = Iterator()  # noqa: F841
        raise StoppedEarly('stopped at step 4 of 8, and saved')

    monkeypatch.setattr(loop, 'train', train)
    monkeypatch.setattr(os, '_exit', happened.append)
    _, stdout, stderr = command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={tmp_path / "run"}')
    assert happened[0] == 42 and stdout == ''
    assert 'stopped at step 4 of 8, and saved: the same command resumes' in stderr


def test_a_second_signal_ends_at_once(start_run, tmp_path):
    """Even amid a loop of steps that would go on for minutes."""
    endless = ('--gin_param=train.epochs=1e6', *(f'--gin_param=train.{name}=1000000000' for name in (
        'max_steps', 'steps_per_loop', 'log_every_steps', 'checkpoint_every_steps', 'eval_every_epochs', 'grace_secs')))
    run = start_run(*endless, '--gin_param=train.checkpoint_every_secs=0.001')
    # Saved after the first loop, which is of one step: nothing is asked between that and the end of the second one.
    wait_for((tmp_path / 'run/checkpoints/ckpt-00000001').exists, run)
    run.send_signal(signal.SIGTERM)
    lines = iter(run.stderr.readline, '')
    assert any('SIGTERM: stopping and saving' in line for line in lines)
    run.send_signal(signal.SIGTERM)  # the same one, as systemd tells all processes of a unit and a launcher its trainer
    time.sleep(2.2)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    stderr = run.communicate(timeout=20)[1]
    assert run.returncode == 128 + signal.SIGTERM and 'SIGTERM again: the last checkpoint stays' in stderr


def test_a_signal_before_anything_is_trained_ends_at_once(start_run, tmp_path):
    run = start_run(*SLOW)
    assert any(line.startswith('workdir ') for line in iter(run.stderr.readline, ''))
    run.send_signal(signal.SIGTERM)
    stderr = run.communicate(timeout=20)[1]
    assert run.returncode == 42 and 'SIGTERM: nothing to save yet' in stderr
    assert not (tmp_path / 'run').exists()


def test_a_signal_that_the_process_was_told_to_ignore_is_ignored(start, tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = start(f'--workdir={tmp_path}', '--gin_param=data.name="shapes"', '--gin_file=gin/quickstart.gin',
                    f'--data_dir={tmp_path / "absent" / "x"}')
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert any(line.startswith('workdir ') for line in iter(run.stderr.readline, ''))
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.poll() is None
    run.kill()
    run.communicate()


def test_data_that_cannot_be_read_for_a_while_is_worth_another_try(make_folder, recipe, start, tmp_path):
    """As on a network disk: a launcher starts the run again, which an error of any other kind would end."""
    data, away = make_folder(tmp_path / 'data'), tmp_path / 'away'
    flags = (f'--gin_file={recipe}', f'--data_dir={data}', f'--workdir={tmp_path / "run"}', *SLOW)
    run = start(*flags, command=few_blocks.COMMAND)
    wait_for((tmp_path / 'run/checkpoints/ckpt-00000004').exists, run)
    (data / 'train/b').rename(away)
    stderr = run.communicate(timeout=60)[1]
    assert run.returncode == 75
    assert re.search(r'^error: the data cannot be read: .*data/train/b/.*run the same', stderr, re.MULTILINE)
    away.rename(data / 'train/b')
    again = start(*flags, '--gin_param=train.max_steps=8', command=few_blocks.COMMAND)
    assert 'resuming from' in again.communicate(timeout=120)[1] and again.returncode == 0


def test_a_run_whose_stderr_is_gone_saves_and_stops(start_run, tmp_path):
    """As under `2>&1 | tee log`, when Ctrl-C ends tee too."""
    run = start_run(*SLOW)
    wait_for((tmp_path / 'run/checkpoints/ckpt-00000004').exists, run)
    run.stderr.close()
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 42
    assert tensors(tmp_path / 'run')['step'] < NUM_STEPS


def linear_classifier():
    images = keras.Input((8, 8, 3))
    return keras.Model(images, keras.layers.Dense(3, name='classifier')(keras.layers.Flatten()(images)))


def fit(workdir, monkeypatch, stop_at=None, **settings):
    """Trains for 8 steps with evaluations of 3 batches after steps 3, 6 and 8; should_stop says so at its n-th call."""
    calls = []

    def should_stop():
        calls.append(None)
        return len(calls) == stop_at

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 8, 8, 3), np.uint8), rng.integers(0, 3, 24)
    keras.utils.set_random_seed(1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, 'train', functools.partial(loop.train, should_stop=should_stop))
        result = trainer.train(linear_classifier(), images, labels, epochs=8 / 3, global_batch_size=8,
                               eval_data=(images[:21], labels[:21]), workdir=workdir, peak_rate=1e-3,
                               **{'steps_per_loop': 1, 'log_every_steps': 2} | settings)
    return len(calls), {tag: value for tag, value in result.items() if not tag.startswith(CLOCK)}


def test_wherever_it_is_stopped_it_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    """Before the first step, after each, and within each evaluation, which is made anew."""
    num_calls, of_whole = fit(tmp_path / 'whole', monkeypatch)
    evaluated = [line for line in reports(tmp_path / 'whole') if 'eval/loss' in line]
    assert [line['step'] for line in evaluated] == [3, 6, 8] and num_calls == 1 + 8 + 3 * (3 + 1)
    num_stopped = 0
    for stop_at in range(1, num_calls + 1):
        workdir = tmp_path / str(stop_at)
        try:
            _, result = fit(workdir, monkeypatch, stop_at)
        except StoppedEarly:
            num_stopped += 1
            _, result = fit(workdir, monkeypatch)
        assert_equal_bits(workdir, tmp_path / 'whole')
        assert reports(workdir) == reports(tmp_path / 'whole'), f'stopped at call {stop_at}'
        assert result == of_whole and os.listdir(workdir / 'best') == os.listdir(tmp_path / 'whole/best')
    assert num_stopped == num_calls - 1  # asked once more when all was done


def test_loops_are_as_short_as_the_grace_needs(tmp_path, monkeypatch):
    """They are of one step or batch where all are too slow; the result does not depend on it."""
    (slow, of_slow), (fast, of_fast) = (
        fit(tmp_path / str(secs), monkeypatch, steps_per_loop=100, log_every_steps=100, grace_secs=secs)
        for secs in (1e-9, 1e9))
    assert slow == 1 + 8 + 3 * (3 + 1)  # before the first step, after each, before each batch, after each evaluation
    assert fast == 1 + (1 + 3) + 3 * (2 + 1)  # one step that is traced, up to each evaluation; one batch, the others
    assert of_slow == of_fast
