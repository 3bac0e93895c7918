"""What --mode=eval and --mode=benchmark print and leave behind, from any directory."""

import json
import shutil

import few_blocks
import pytest
from cli_harness import assert_refused

NUM_EVAL = 21  # of conftest's folder


def test_eval_prints_one_json_object_and_changes_nothing(command, trained, folder, recipe, snapshot):
    before = snapshot(trained)
    reported = json.loads((trained / 'metrics.jsonl').read_text().splitlines()[-1])
    for which, where in (('best', 'best'), (trained / 'checkpoints' / 'ckpt-00000006', 'checkpoints')):
        code, stdout, stderr = command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={trained}',
                                       '--mode=eval', f"--gin_param=evaluate.checkpoint='{which}'")
        assert code == 0, stderr
        (line,) = stdout.splitlines()
        result = json.loads(line)
        assert result['eval/examples'] == NUM_EVAL and result['step'] == 6
        assert result['checkpoint'] == str(trained / where / 'ckpt-00000006')
        for tag in ('eval/loss', 'eval/top1', 'eval/top5'):
            assert result[tag] == pytest.approx(reported[tag], rel=1e-5)
    assert snapshot(trained) == before


def test_workers_that_would_evaluate_different_checkpoints_are_refused(command, trained, folder, recipe, monkeypatch):
    monkeypatch.setattr('trainer.evaluate.find_worker', lambda strategy: (0, 2))
    for other, is_same in ((6, True), (5, False)):
        monkeypatch.setattr('trainer.evaluate.make_sum_over_workers',
                            lambda strategy, other=other: lambda own: own + other)
        result = command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={trained}', '--mode=eval')
        if is_same:
            assert result[0] == 0, result[2]
        else:
            assert_refused(result, "evaluate.checkpoint is 'latest'", 'workers')


def test_another_directory_with_relative_paths(tmp_path, folder, recipe, run, snapshot):
    """A gin file beside the user, one of the repository, and the default workdir."""
    shutil.copy(recipe, tmp_path / 'mine.gin')
    (tmp_path / 'data').symlink_to(folder)
    flags_ = ['--gin_file=mine.gin', '--gin_file=gin/hardware/cpu.gin', '--data_dir=data',
              '--gin_param=train.max_steps=1']
    finished = run(*flags_, cwd=tmp_path, command=few_blocks.COMMAND)
    assert (finished.returncode, finished.stdout) == (0, ''), finished.stderr
    assert finished.stderr.splitlines()[0] == 'workdir runs/mine'
    before = snapshot(tmp_path)
    evaluated = run(*flags_, '--mode=eval', cwd=tmp_path, command=few_blocks.COMMAND)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout.splitlines()[-1])['checkpoint'] == 'runs/mine/checkpoints/ckpt-00000001'
    assert snapshot(tmp_path) == before


def test_statistics_taken_anew_count_in_training_and_in_eval(command, tmp_path, folder, recipe):
    flags = (f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={tmp_path}', '--gin_param=train.max_steps=3',
             '--gin_param=train.image_sizes=((0, 32), (0.5, 24))')
    precise = '--gin_param=train.eval_precise_batch_norm=2'
    assert command(*flags, precise)[0] == 0
    trained = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
    again, moving = (json.loads(command(*flags, *more, '--mode=eval')[1].splitlines()[-1]) for more in ([precise], []))
    assert again['eval/loss'] == pytest.approx(trained['eval/loss'], rel=1e-6)
    # Three steps of moving statistics are still near their initial values.
    assert abs(moving['eval/loss'] - again['eval/loss']) > 0.01


def test_benchmark_prints_three_rates_and_leaves_no_trace(command, monkeypatch, folder, recipe, tmp_path):
    monkeypatch.setattr('trainer.benchmark.MIN_SECS', 0.3)
    code, stdout, stderr = command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={tmp_path / "run"}',
                                   '--mode=benchmark')
    assert code == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    # A step of GhostNet on 8 images takes many times as long as to decode them, here as everywhere without a GPU.
    assert 0 < result['step_images_per_sec'] < result['input_images_per_sec'] / 2
    assert 0 < result['images_per_sec'] < result['input_images_per_sec'] / 2
    assert 0 <= result['data_wait_fraction'] < 0.5 and 0 < result['train/input_decode'] < 1
    assert 'input alone' in stderr and not (tmp_path / 'run').exists()
