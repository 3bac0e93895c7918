"""A run that was stopped or killed equals one that was not, in every bit of every tensor of its last checkpoint."""

import json
import signal
import time

import few_blocks
import numpy as np
import pytest
import tensorflow as tf
from workdir_reader import assert_equal_bits, reports, tensors

NUM_STEPS, BATCH, NUM_TRAIN, NUM_EVAL = 13, 8, 42, 21  # of conftest's recipe and folder
TRAIN_TAGS = {'train/loss', 'train/top1', 'train/learning_rate', 'train/images_per_sec', 'train/data_wait_fraction',
              'train/grad_norm'}
EVAL_TAGS = {'eval/loss', 'eval/top1', 'eval/top5', 'eval/examples'}
# Together with dropout, which is 0.2 in both, everything that could keep a state of its own.
ONE_DEVICE = ('--gin_param=train.ema_decay=0.9', '--gin_param=train.mixup_alpha=0.4',
              '--gin_param=train.cutmix_alpha=1.0', '--gin_param=train.erase_probability=0.5',
              '--gin_param=train.image_sizes=((0, 24), (1, 32))')
REPLICAS = ("--gin_param=build_strategy.name='mirrored'", '--gin_param=build_strategy.num_devices=2')


def assert_whole(workdir, eval_kinds=('eval',)):
    """What the README promises of the workdir of a finished run."""
    values = tensors(workdir)
    assert values['step'] == NUM_STEPS and values['position'] == NUM_STEPS * BATCH
    assert tf.train.latest_checkpoint(workdir / 'checkpoints').endswith(f'ckpt-{NUM_STEPS:08d}/state')
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    train_lines = [line for line in lines if 'train/loss' in line]
    eval_lines = [line for line in lines if 'eval/loss' in line]
    assert [line['step'] for line in train_lines] == list(range(1, NUM_STEPS + 1))
    # After each whole epoch of 5.25 steps, and at the end.
    assert [line['step'] for line in eval_lines] == [6, 11, 13]
    assert lines[-1] == eval_lines[-1] and len(lines) == len(train_lines) + len(eval_lines)
    for line in train_lines:
        assert TRAIN_TAGS <= line.keys() and all(np.isfinite(value) for value in line.values())
        assert 0 <= line['train/top1'] <= 1 and 0 <= line['train/data_wait_fraction'] <= 1
    for line in eval_lines:
        tags = {f'{kind}/{tag.split("/")[1]}' for kind in eval_kinds for tag in EVAL_TAGS}
        assert line.keys() == tags | {'step', 'time'}
        assert line['eval/examples'] == NUM_EVAL
    for name in ('config.gin', 'operative_config.gin', 'train', 'eval', 'checkpoints', 'best'):
        assert (workdir / name).exists()


def finish(process):
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (0, ''), stderr
    return stderr


@pytest.fixture(scope='module')
def start_run(folder, recipe, start):
    return lambda workdir, *flags: start(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={workdir}', *flags,
                                         command=few_blocks.COMMAND)


@pytest.fixture(scope='module')
def runs(tmp_path_factory, start_run):
    """Workdirs of uninterrupted runs with and without replicas, made at the same time."""
    workdirs = {name: tmp_path_factory.mktemp(name) for name in ('one_device', 'replicas')}
    processes = [start_run(workdirs['one_device'], *ONE_DEVICE), start_run(workdirs['replicas'], *REPLICAS)]
    for process in processes:
        finish(process)
    return workdirs


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory, start_run):
    """Workdirs of a run that was stopped and of one that was killed, made at the same time, and what resuming said."""
    stopped, killed = tmp_path_factory.mktemp('stopped'), tmp_path_factory.mktemp('killed')
    stopping = start_run(stopped, *REPLICAS, '--gin_param=train.max_steps=7')
    doomed = start_run(killed, *ONE_DEVICE)
    metrics, is_saved = killed / 'metrics.jsonl', (killed / 'checkpoints/checkpoint').exists
    # Between step 5 and the end the process has to trace the evaluation, which takes it seconds.
    while doomed.poll() is None and not (is_saved() and metrics.exists() and '"step": 5,' in metrics.read_text()):
        time.sleep(0.005)
    doomed.send_signal(signal.SIGKILL)
    _, stderr = doomed.communicate()
    assert doomed.returncode == -signal.SIGKILL, stderr
    assert tensors(killed)['step'] == 4
    finish(stopping)
    assert tensors(stopped)['position'] == 7 * BATCH and 7 * BATCH % NUM_TRAIN != 0
    assert reports(stopped)[-1].keys() == EVAL_TAGS | {'step'}
    processes = start_run(stopped, *REPLICAS), start_run(killed, *ONE_DEVICE)
    return {name: (workdir, finish(process))
            for name, workdir, process in zip(('stopped', 'killed'), (stopped, killed), processes)}


def test_a_finished_run_has_what_is_promised(runs):
    assert_whole(runs['replicas'])
    assert_whole(runs['one_device'], ('eval', 'eval_ema'))
    names = tensors(runs['one_device']).keys()
    assert {name.split('/')[0] for name in names} == {'step', 'position', 'params', 'batch_stats', 'slots', 'ema'}
    assert 'params/classifier/kernel' in names and 'slots/momentum/classifier/kernel' in names


def test_a_run_stopped_in_the_middle_of_an_epoch_equals_one_that_was_not(runs, interrupted):
    workdir, stderr = interrupted['stopped']
    assert 'ckpt-00000007' in stderr and 'not in bits' not in stderr
    assert_equal_bits(workdir, runs['replicas'])
    # It has been evaluated once more, where it stopped.
    lines = [line for line in reports(workdir) if not (line['step'] == 7 and 'eval/loss' in line)]
    assert len(lines) == len(reports(workdir)) - 1
    assert lines == reports(runs['replicas'])


def test_a_run_that_was_killed_equals_one_that_was_not(runs, interrupted):
    workdir, stderr = interrupted['killed']
    assert 'ckpt-00000004' in stderr and 'not in bits' not in stderr
    assert_equal_bits(workdir, runs['one_device'])
    assert_whole(workdir, ('eval', 'eval_ema'))
    assert reports(workdir) == reports(runs['one_device'])


def test_image_sizes_are_those_of_their_epochs(runs, tmp_path, start_run):
    """24 pixels for the 5.25 steps of the first epoch, as if the size had been changed by hand."""
    *others, _ = ONE_DEVICE
    finish(start_run(tmp_path, *others, '--gin_param=train_dataset.image_size=24', '--gin_param=train.max_steps=5'))
    finish(start_run(tmp_path, *others, '--gin_param=train.allow_config_change=True'))
    assert_equal_bits(tmp_path, runs['one_device'])


def test_the_command_of_a_finished_run_says_so_and_changes_nothing(runs, start_run, snapshot):
    before = snapshot(runs['one_device'])
    stderr = finish(start_run(runs['one_device'], *ONE_DEVICE))
    assert 'finished' in stderr and str(runs['one_device']) in stderr
    assert snapshot(runs['one_device']) == before
