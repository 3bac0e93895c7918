"""The fingerprint says what a resume must match: what changes the numbers, and nothing else."""

import dataclasses
import inspect

import pytest
from config_harness import NEEDED, difference, load

from trainer import config, recipe

LEFT_OUT = {'train.max_steps': '5', 'train.steps_per_loop': '5', 'train.jit': 'True',
            'train.checkpoint_every_steps': '5', 'train.checkpoint_every_secs': '5', 'train.keep_checkpoints': '5',
            'train.log_every_steps': '5', 'train.eval_every_epochs': '5', 'train.eval_flip': 'True',
            'train.eval_precise_batch_norm': '5',
            'train.keep_every_steps': '5', 'train.save_retry_secs': '5', 'train.bad_example_budget': '0.1',
            'train.max_rollbacks': '5', 'train.grace_secs': '5', 'train.step_timeout_secs': '5',
            'train.allow_config_change': 'True',
            'data.default_dir': "'/elsewhere'", 'data.otherwise': "'shapes'", 'data.cache': 'True',
            'build_strategy.name': "'mirrored'",
            'build_strategy.num_devices': '2', 'build_strategy.op_threads': '1', 'build_strategy.timeout_secs': '5',
            'evaluate.checkpoint': "'best'", 'evaluate.weights': "'ema'"}
TAKEN_IN = {'train.seed': '1', 'train.epochs': '90', 'train.global_batch_size': '64', 'train.label_smoothing': '0.2',
            'train.mixup_alpha': '0.2', 'train.cutmix_alpha': '1.0', 'train.erase_probability': '0.2',
            'train.clip_norm': '1.0', 'train.adaptive_clip': '0.01', 'train.ema_decay': '0.999',
            'train.rollback_after': '5', 'train.initial_weights': "'a.npz'",
            'train.precision': "'mixed_bfloat16'", 'train.all_reduce_dtype': "'bfloat16'",
            'train.sync_batch_norm': 'True', 'train.accumulate': '2', 'train.image_sizes': '((0, 32), (1.5, 64))',
            'ghostnet.width': '0.5', 'ghostnet.num_classes': '10',
            'ghostnet.dropout': '0.1', 'sgd.momentum': '0.8', 'sgd.nesterov': 'True', 'sgd.weight_decay': '0.0',
            'cosine.peak_rate': '0.1', 'cosine.warmup_epochs': '1', 'cosine.final_rate': '0.01',
            'cosine.initial_rate': '0.001', 'cosine.rate_batch_size': '256',
            'train_dataset.image_size': '64', 'train_dataset.flip': 'False', 'random_resized_crop.scale': '(0.5, 1.0)',
            'eval_dataset.resize': '300', 'data.name': "'folder'", 'data.train_split': "'a'",
            'data.pixel_mean': '(0.5, 0.5, 0.5)'}


@pytest.mark.parametrize('name', LEFT_OUT)
def test_where_how_often_and_how_fast_is_left_out(name):
    assert difference(f'{name}={LEFT_OUT[name]}') == {}


@pytest.mark.parametrize('name', TAKEN_IN)
def test_what_changes_the_numbers_is_taken_in(name):
    assert difference(f'{name}={TAKEN_IN[name]}') == {name: TAKEN_IN[name]}


def test_another_part_is_another_recipe():
    shared = [f'{name}={value}' for name, value in NEEDED.items()]
    one = load(*shared, files=[]).fingerprint
    other = load(*shared, 'train_dataset.crop=@random_shift()', files=[]).fingerprint
    assert one['train_dataset.crop'] != other['train_dataset.crop']
    assert 'random_shift.max_shift' in other and 'random_resized_crop.scale' not in other


def test_every_setting_of_training_and_data_is_one_or_the_other():
    fingerprint = load().fingerprint
    for prefix, cls in (('train', recipe.Train), ('data', recipe.Data)):
        for field in dataclasses.fields(cls):
            name = f'{prefix}.{field.name}'
            assert (name in fingerprint) != (name in LEFT_OUT), name


def test_a_default_that_is_spelled_out_changes_nothing():
    """Of every setting of every root and part that a recipe reaches."""
    fingerprint, num_spelled_out = load().fingerprint, 0
    for name, target in config._ROOTS.items() | config._PARTS.items():
        for parameter in inspect.signature(target).parameters.values():
            key = f'{name}.{parameter.name}'
            is_plain = parameter.default is None or isinstance(parameter.default, bool | int | float | str | tuple)
            if is_plain and fingerprint.get(key) == repr(parameter.default):
                assert load(f'{key}={parameter.default!r}').fingerprint == fingerprint, key
                num_spelled_out += 1
    assert num_spelled_out > 15


def test_the_fingerprint_is_text_that_json_keeps():
    assert {type(item) for pair in load().fingerprint.items() for item in pair} == {str}
    # Nothing that another process would spell in another way.
    assert [value for value in load().fingerprint.values() if ' at 0x' in value] == []
