"""Whatever is wrong ends in one line on stderr and exit code 2, with nothing harmed."""

import collections
import dataclasses
import json
import shutil

import pytest
from cli_harness import assert_refused

import input_pipeline
from input_pipeline import order
from trainer import checkpoint

NUM_TRAIN, NUM_EVAL = 42, 21  # of conftest's folder


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
