"""A run that is killed again and again, and started again each time, ends where one does that was left alone.

Three kills here; the long form takes 25:

    LONG_TESTS=1 ./launch/test.sh tests/faults
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import few_blocks
import numpy as np
import pytest
from workdir_reader import assert_equal_bits, reports, tensors

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_KILLS = 25 if os.environ.get('LONG_TESTS') else 3
# On conftest's folder of 42 and 21 examples; no life may last long enough to finish.
NUM_STEPS, BATCH, NUM_EVAL, STEPS_PER_LIFE = 60 * NUM_KILLS, 8, 21, 45
SETTINGS = {'train.epochs': NUM_STEPS * BATCH / 42 + 0.01, 'train.ema_decay': 0.9, 'train.checkpoint_every_steps': 7,
            'train.eval_every_epochs': 2, 'train.keep_checkpoints': 2}


def start(workdir, recipe, folder):
    """The trainer in a process of its own; what it says goes to a file, since a full pipe would stop it."""
    with open(workdir.with_suffix('.log'), 'a', encoding='utf-8') as log:
        return subprocess.Popen(
            [*few_blocks.COMMAND, f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={workdir}',
             *(f'--gin_param={name}={value}' for name, value in SETTINGS.items())],
            cwd=REPOSITORY, env={**os.environ, 'PYTHONPATH': str(REPOSITORY)}, stdout=subprocess.DEVNULL, stderr=log)


def assert_finishes(process, workdir):
    assert process.wait(timeout=300) == 0, workdir.with_suffix('.log').read_text()[-2000:]


def last_report(workdir):
    """Of metrics.jsonl; {} if there is none yet, or only half of it."""
    try:
        with open(workdir / 'metrics.jsonl', 'rb') as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            return json.loads(file.read().splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return {}


def is_saving(workdir):
    return any((workdir / 'checkpoints').glob('.writing-ckpt-*'))


def is_evaluating(workdir):
    """Steps are reported before they are evaluated, and with them whatever the evaluation found."""
    report = last_report(workdir)
    return 'train/loss' in report and report['step'] % 21 in (0, 11)  # every 10.5 steps


def kill_at(process, workdir, moment, rng):
    """Kills the process at the first such moment after a number of steps drawn at random, and says at which step."""
    first = last_report(workdir).get('step', 0)
    if moment != 'start':
        after = first + int(rng.integers(1, STEPS_PER_LIFE))
        is_there = {'save': is_saving, 'evaluation': is_evaluating, 'any': lambda workdir: True}[moment]
        while last_report(workdir).get('step', 0) < after or not is_there(workdir):
            assert process.poll() is None, workdir.with_suffix('.log').read_text()[-2000:]
            time.sleep(0.0005)
    else:
        time.sleep(rng.uniform(0, 5))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return last_report(workdir).get('step', 0)


@pytest.fixture
def cleanup():
    with contextlib.ExitStack() as stack:
        yield stack


def test_killed_at_random_it_ends_as_if_it_had_not_been(recipe, folder, tmp_path, cleanup):
    """In every bit of every tensor, in every metric of every step, each example being counted once."""
    alone, killed = tmp_path / 'alone', tmp_path / 'killed'
    undisturbed = start(alone, recipe, folder)
    cleanup.callback(undisturbed.kill)
    rng = np.random.default_rng(0)
    for kill in range(NUM_KILLS):
        moment = ('save', 'evaluation', 'any', 'start')[kill % 4]
        process = start(killed, recipe, folder)
        cleanup.callback(process.kill)
        print(f'kill {kill + 1}: {moment}, at step {kill_at(process, killed, moment, rng)}')
    last = start(killed, recipe, folder)
    cleanup.callback(last.kill)
    assert_finishes(last, killed)
    assert_finishes(undisturbed, alone)
    assert_equal_bits(killed, alone)
    assert tensors(killed)['step'] == NUM_STEPS and tensors(killed)['position'] == NUM_STEPS * BATCH
    assert reports(killed) == reports(alone)
    steps = [line['step'] for line in reports(killed) if 'train/loss' in line]
    assert steps == list(range(1, NUM_STEPS + 1))
    assert {line['eval/examples'] for line in reports(killed) if 'eval/loss' in line} == {NUM_EVAL}
    assert not list((killed / 'checkpoints').glob('.*'))
