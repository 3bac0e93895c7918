"""Whatever is wrong ends in one line on stderr and exit code 2, with nothing harmed; and what the modes print."""

import collections
import dataclasses
import json
import logging
import shutil
import sys

import few_blocks
import numpy as np
import pytest
from absl import flags
from workdir_reader import tensors

import ghostnet
import input_pipeline
from input_pipeline import order
from trainer import checkpoint
from trainer.main import main

NUM_TRAIN, NUM_EVAL = 42, 21  # of conftest's folder


@pytest.fixture
def command(capsys, monkeypatch):
    """command(*flags) -> (exit code, stdout, stderr) of few_blocks.py, in this process."""
    monkeypatch.setattr('ghostnet.model.BLOCKS', few_blocks.few_blocks())
    root, absl = logging.getLogger(), logging.getLogger('absl')
    handlers, levels = root.handlers[:], (root.level, absl.level)

    def run(*arguments):
        flags.FLAGS.unparse_flags()  # or flags that repeat would add to those of the last call
        capsys.readouterr()
        code = main(['trainer.main', *map(str, arguments)])
        return code, *capsys.readouterr()

    yield run
    root.handlers[:] = handlers  # main logs to what stderr is at the time
    root.setLevel(levels[0])
    absl.setLevel(levels[1])
    flags.FLAGS.unparse_flags()


@pytest.fixture(scope='module')
def trained(tmp_path_factory, folder, recipe, run):
    """The workdir of a finished run of six steps, one epoch and an evaluation, only to be read."""
    workdir = tmp_path_factory.mktemp('trained')
    finished = run(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={workdir}',
                   '--gin_param=train.max_steps=6', command=[sys.executable, few_blocks.__file__])
    assert finished.returncode == 0, finished.stderr
    return workdir


def assert_refused(result, *words):
    """Exit code 2, nothing on stdout, and the words in the one line at the end of stderr."""
    code, stdout, stderr = result
    assert code == 2, stderr
    assert stdout == ''
    assert 'Traceback' not in stderr
    lines = stderr.splitlines()
    assert [line for line in lines if line.startswith('error: ')] == lines[-1:]
    for word in words:
        assert str(word) in lines[-1], lines[-1]


# Mistakes that are found before anything is made

@pytest.mark.parametrize(('flag', 'words'), [
    ('gin/quickstart.gin', ['gin/quickstart.gin', '--gin_file=gin/quickstart.gin']),
    ('--gin_flie=gin/quickstart.gin', ['gin_flie', 'gin_file']),
    ('--mode=trian', ['trian', 'train', 'eval']),
    ('--gin_file=gin/imagnet.gin', ['gin/imagnet.gin']),
    ('--gin_param=ghostnet.widht=0.5', ['widht', 'did you mean ghostnet.width?']),
    ('--gin_param=ghotsnet.width=0.5', ['ghotsnet', 'did you mean ghostnet?']),
    ('--gin_param=train.model=@ghotsnet', ['ghotsnet', 'did you mean ghostnet?']),
    ('--gin_param=random_shift.max_shift=3', ['random_shift.max_shift', 'nothing uses random_shift']),
    ('--gin_bindings=random_shift.max_shift=3', ['random_shift.max_shift']),
    ('--gin_param=train.epochs=', ['train.epochs=']),
    ('--gin_param=train.epochs=-1', ['train.epochs', '-1']),
    ('--gin_param=train.epochs=0.01', ['train.epochs', '0.01', '42']),
    ("--gin_param=train.precision='float8'", ['train.precision', 'float8', 'mixed_bfloat16']),
    ('--gin_param=ghostnet.width=-1', ['ghostnet.width', '-1']),
    ('--gin_param=ghostnet.num_classes=3', ['4 classes', '3', 'ghostnet.num_classes = 4']),
    ('--gin_param=cosine.warmup_epochs=9', ['cosine.warmup_epochs', '9']),
    ('--gin_param=sgd.momentum=1.5', ['sgd.momentum', '1.5']),
    ("--gin_param=build_strategy.name='mirorred'", ['mirorred', 'mirrored']),
    ("--gin_param=data.name='foldre'", ['foldre', 'folder']),
    ("--gin_param=data.eval_split='test'", ['test', 'train, validation']),
    ('--workers=alpha,beta', ['--workers', 'alpha,beta', 'alpha:2222']),
    ('--workers=alpha:1,beta:1', ['--worker_index', 'None', '0..1']),
    ('--worker_index=0', ['--worker_index', '0', '--workers']),
    ('--gin_param=eval_dataset.resize=16', ['eval_dataset', '16', '32']),
], ids=lambda value: value if isinstance(value, str) else '')
def test_mistakes_end_in_one_line_and_touch_nothing(command, tmp_path, folder, recipe, flag, words):
    workdir = tmp_path / 'work'
    assert_refused(command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={workdir}', flag), *words)
    assert not workdir.exists()


def test_a_batch_that_the_replicas_do_not_divide(command, tmp_path, folder, recipe):
    assert_refused(command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={tmp_path / "work"}',
                           "--gin_param=build_strategy.name='mirrored'", '--gin_param=build_strategy.num_devices=3'),
                   'train.global_batch_size', '8', '3 replicas', '6')
    assert not (tmp_path / 'work').exists()


def test_no_recipe(command, tmp_path):
    assert_refused(command(f'--workdir={tmp_path / "work"}'), 'train.', '--gin_file')
    assert not (tmp_path / 'work').exists()


def test_a_data_directory_that_is_missing(command, tmp_path, recipe):
    assert_refused(command(f'--gin_file={recipe}', f'--data_dir={tmp_path / "nowhere"}',
                           f'--workdir={tmp_path / "work"}'), tmp_path / 'nowhere')
    assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize(('flag', 'word'), [('--gin_param=random_shift.max_shift=3', 'random_shift.max_shift'),
                                            ('--mode=trian', 'trian'), ('stray', "'stray'")])
def test_the_process_itself_ends_so_too(tmp_path, recipe, run, flag, word):
    finished = run(f'--gin_file={recipe}', f'--workdir={tmp_path / "work"}', flag, cwd=tmp_path)
    assert_refused((finished.returncode, finished.stdout, finished.stderr), word)
    assert list(tmp_path.iterdir()) == []


# Mistakes beside what a run has made

def test_resuming_with_another_recipe_names_the_difference(command, trained, folder, recipe, snapshot):
    before = snapshot(trained)
    assert_refused(command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={trained}',
                           '--gin_param=train.seed=3', '--gin_param=sgd.momentum=0.8'),
                   trained, 'train.seed was 0, is 3', 'sgd.momentum was 0.9, is 0.8', '--workdir')
    assert snapshot(trained) == before


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_a_checkpoint_of_another_model(command, trained, folder, recipe, snapshot, mode):
    before = snapshot(trained)
    assert_refused(command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={trained}', f'--mode={mode}',
                           '--gin_param=ghostnet.width=0.5', '--gin_param=train.allow_config_change=True'),
                   trained / 'checkpoints' / 'ckpt-00000006', 'another model', 'other shape batch_stats/block_1/')
    assert snapshot(trained) == before


def test_evaluating_what_is_not_there(command, trained, folder, recipe, tmp_path, snapshot):
    before = snapshot(trained)
    common = [f'--gin_file={recipe}', f'--data_dir={folder}', '--mode=eval']
    assert_refused(command(*common, f'--workdir={tmp_path / "work"}'), tmp_path / 'work' / 'checkpoints')
    assert not (tmp_path / 'work').exists()
    assert_refused(command(*common, f'--workdir={trained}', "--gin_param=evaluate.checkpoint='bset'"), 'bset', 'best')
    assert_refused(command(*common, f'--workdir={trained}', "--gin_param=evaluate.weights='ema'"), 'train.ema_decay')
    damaged = tmp_path / 'ckpt-00000006'
    shutil.copytree(trained / 'checkpoints' / 'ckpt-00000006', damaged)
    with open(damaged / 'state.data-00000-of-00001', 'r+b') as file:
        file.seek(1000)
        file.write(b'damage')
    assert_refused(command(*common, f'--workdir={trained}', f"--gin_param=evaluate.checkpoint='{damaged}'"),
                   damaged, 'state.data-00000-of-00001')
    assert snapshot(trained) == before


def test_a_training_file_that_is_no_image_is_named_and_repaired(command, trained, tmp_path, make_folder, recipe,
                                                                snapshot):
    data_dir, workdir = make_folder(tmp_path / 'data'), tmp_path / 'work'
    shutil.copytree(trained, workdir)
    files = sorted((data_dir / 'train').rglob('*.jpg'))
    position = 6 * 8 + 3  # in the first batch after the checkpoint
    bad = files[order.permutation(0, position // NUM_TRAIN, NUM_TRAIN)[position % NUM_TRAIN]]
    image = bad.read_bytes()
    bad.write_text('no image\n')
    before = snapshot(workdir / 'checkpoints')
    flags_ = [f'--gin_file={recipe}', f'--data_dir={data_dir}', f'--workdir={workdir}', '--gin_param=train.max_steps=8']
    assert_refused(command(*flags_), bad, 'no image')
    assert snapshot(workdir / 'checkpoints') == before
    bad.write_bytes(image)
    code, _, stderr = command(*flags_)
    assert code == 0, stderr
    assert checkpoint.latest_valid(workdir / 'checkpoints').name == 'ckpt-00000008'


def test_an_evaluation_file_that_is_no_image_is_named(command, trained, tmp_path, make_folder, recipe, snapshot):
    data_dir, before = make_folder(tmp_path / 'data'), snapshot(trained)
    bad = sorted((data_dir / 'validation').rglob('*.jpg'))[-1]
    bad.write_bytes(bad.read_bytes()[:200])
    assert_refused(command(f'--gin_file={recipe}', f'--data_dir={data_dir}', f'--workdir={trained}', '--mode=eval'),
                   bad, f'1 of the {NUM_EVAL}')
    assert snapshot(trained) == before


def test_a_few_bad_files_are_masked_named_and_counted(command, tmp_path, make_folder, recipe):
    data_dir, workdir = make_folder(tmp_path / 'data'), tmp_path / 'work'
    files = {split: sorted((data_dir / split).rglob('*.jpg')) for split in ('train', 'validation')}
    files['train'][17].write_bytes(b'')
    files['train'][30].write_bytes(files['train'][30].read_bytes()[:300])
    files['validation'][4].write_text('no image\n')
    flags_ = [f'--gin_file={recipe}', f'--data_dir={data_dir}', f'--workdir={workdir}',
              '--gin_param=train.bad_example_budget=0.05', '--gin_param=train.ema_decay=0.9']  # evaluated twice
    code, _, stderr = command(*flags_, '--gin_param=train.max_steps=6')
    assert code == 0, stderr
    found = [json.loads(line) for line in (workdir / 'bad_examples.jsonl').read_text().splitlines()]
    assert sorted((entry['source'], entry['index']) for entry in found) == [
        (f'folder {data_dir / "train"}', 17), (f'folder {data_dir / "train"}', 30),
        (f'folder {data_dir / "validation"}', 4)]
    assert {entry['index']: 'empty' in entry['reason'] for entry in found} == {17: True, 30: False, 4: False}
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert lines[-1]['eval/examples'] == NUM_EVAL - 1
    assert [line['train/bad_examples'] for line in lines if 'train/bad_examples' in line][-1] == 2
    assert str(files['train'][17]) in stderr and 'example 17' in stderr
    # The same run again, from its checkpoint: they are known, and not written twice.
    before = (workdir / 'bad_examples.jsonl').read_text()
    code, _, stderr = command(*flags_, '--gin_param=train.max_steps=12')
    assert code == 0, stderr
    assert (workdir / 'bad_examples.jsonl').read_text() == before
    code, stdout, stderr = command(*flags_, '--mode=eval')
    assert code == 0 and json.loads(stdout)['eval/examples'] == NUM_EVAL - 1, stderr
    # Fewer are allowed than there are.
    assert_refused(command(*flags_, '--gin_param=train.bad_example_budget=0.01'), 'train.bad_example_budget = 0.01')


def test_a_training_split_kept_in_memory_is_read_once(command, monkeypatch, tmp_path, folder, recipe):
    reads, open_source = collections.Counter(), input_pipeline.open_source

    def open_counted(name, data_dir, split, **options):
        source = open_source(name, data_dir, split, **options)
        return dataclasses.replace(source, read=lambda indices: reads.update({split: len(indices)})
                                   or source.read(indices))

    monkeypatch.setattr(input_pipeline, 'open_source', open_counted)
    code, _, stderr = command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={tmp_path / "work"}',
                              '--gin_param=train.max_steps=6', '--gin_param=data.cache=True')
    assert code == 0, stderr
    # Six batches of eight are more than an epoch. Two threads that want the same new one at once may both read it.
    assert NUM_TRAIN <= reads['train'] < 6 * 8
    assert reads['validation'] % NUM_EVAL == 0


def test_a_workdir_far_away_is_refused(command, folder, recipe):
    """It would be a directory here that is named like it."""
    assert_refused(command(f'--gin_file={recipe}', f'--data_dir={folder}', '--workdir=gs://bucket/run'),
                   '--workdir', 'gs://bucket/run', 'mounted')


# Weights to start from

def test_a_new_run_starts_from_the_weights_of_another(command, tmp_path, trained, folder, recipe, snapshot):
    before, weights = snapshot(trained), trained / 'checkpoints' / 'ckpt-00000006'
    code, _, stderr = command(  # the first step's rate is zero
        f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={tmp_path / "work"}',
        '--gin_param=train.max_steps=1', '--gin_param=ghostnet.num_classes=6', '--gin_param=train.ema_decay=0.9',
        f"--gin_param=train.initial_weights='{weights}'")
    assert code == 0, stderr
    (said,) = (line for line in stderr.splitlines() if str(weights) in line and 'start from' in line)
    assert 'other shape params/classifier/bias, params/classifier/kernel' in said and 'missing none' in said
    values, others = tensors(tmp_path / 'work'), tensors(trained)
    assert values['step'] == 1 and values['position'] == 8
    for name, value in others.items():
        if name.startswith('params/') and 'classifier' not in name:
            np.testing.assert_array_equal(values[name], value, err_msg=name)
            np.testing.assert_array_equal(values[f'ema/{name[7:]}'], value, err_msg=name)
    assert values['params/classifier/bias'].shape == (6,)
    assert snapshot(trained) == before


def test_a_new_run_starts_from_a_pytorch_file(command, tmp_path, folder, recipe):
    state = ghostnet.to_pytorch_state_dict(ghostnet.GhostNet(9, 0.25))
    np.savez(tmp_path / 'weights.npz', **state)
    code, _, stderr = command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={tmp_path / "work"}',
                              '--gin_param=train.max_steps=1',
                              f"--gin_param=train.initial_weights='{tmp_path / 'weights.npz'}'")
    assert code == 0, stderr
    assert 'classifier.weight' in stderr
    kernel = tensors(tmp_path / 'work')['params/stem/conv/kernel']
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), state['conv_stem.weight'])


@pytest.mark.parametrize('name', ['nowhere.npz', 'nowhere', 'nothing.txt', 'cut.npz', 'damaged.npz', 'other.npz'])
def test_weights_that_are_none(command, tmp_path, folder, recipe, name):
    (tmp_path / 'nothing.txt').write_text('no weights')
    np.savez(tmp_path / 'other.npz', foo=np.zeros(3))
    whole = (tmp_path / 'other.npz').read_bytes()
    (tmp_path / 'cut.npz').write_bytes(whole[:-10])
    (tmp_path / 'damaged.npz').write_bytes(whole.replace(bytes(24), b'x' * 24))
    assert_refused(command(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={tmp_path / "work"}',
                           f"--gin_param=train.initial_weights='{tmp_path / name}'"),
                   'train.initial_weights', tmp_path / name)
    assert not (tmp_path / 'work').exists()


# What the modes print

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
    finished = run(*flags_, cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (0, ''), finished.stderr
    assert finished.stderr.splitlines()[0] == 'workdir runs/mine'
    before = snapshot(tmp_path)
    evaluated = run(*flags_, '--mode=eval', cwd=tmp_path)
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
