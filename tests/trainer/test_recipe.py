"""Each wrong value of `train.*`, `data.*`, `evaluate.*` gives one line: the name, the value, what would be right."""

import dataclasses

import keras
import pytest

from trainer.recipe import ConfigError, Data, Evaluate, Train

# Of every setting: values that must be refused, and what the message must say would be right.
WRONG_TRAIN = {
    'epochs': ([0, -1, '90', None, True, float('nan'), float('inf')], 'a positive number'),
    'global_batch_size': ([0, -4, 32.0, '32', None, True], 'a positive integer'),
    'model': ([None, 'ghostnet', 3], '@ghostnet'),
    'optimizer': ([None, 'sgd', (abs, abs)], '@sgd'),
    'schedule': ([None, 'cosine', 0.1], '@cosine'),
    'seed': ([-1, 0.5, '0', None, True, 2**32], 'an integer from 0 below 2**32'),
    'max_steps': ([0, -1, 1.5, '5', True], 'None or a positive integer'),
    'steps_per_loop': ([0, -1, 2.5, '5', None, True], 'a positive integer'),
    'jit': (['yes', 'Auto', None, 2], "'auto', True or False"),
    'precision': (['float16', 'bfloat16', None, 16], "'float32', 'tf32', 'mixed_bfloat16' or 'mixed_float16'"),
    'all_reduce_dtype': (['float16', 'half', None, 16], "'float32' or 'bfloat16'"),
    'label_smoothing': ([-0.1, 1, 1.0, '0.1', None, float('nan')], 'at least 0 and below 1'),
    'mixup_alpha': ([0, -0.2, '0.2', True, float('nan')], 'None or a positive number'),
    'cutmix_alpha': ([0, -1, '1', True, float('inf')], 'None or a positive number'),
    'erase_probability': ([-0.1, 1.1, '0.2', None, True, float('nan')], 'a number in [0, 1]'),
    'accumulate': ([0, -1, 2.0, '2', None, True], 'a positive integer'),
    'clip_norm': ([0, -1.0, '1', True], 'None or a positive number'),
    'adaptive_clip': ([0, -0.01, '0.01', True, float('inf')], 'None or a positive number'),
    'spike_factor': ([0, 0.5, '5', True, float('inf')], 'None or a number from 1'),
    'rollback_after': ([0, -1, 1.5, '5', True], 'None or a positive integer'),
    'max_rollbacks': ([-1, 0.5, '0', None, True, 2**32], 'an integer from 0 below 2**32'),
    'ema_decay': ([-0.1, 1, 1.5, '0.9', True], 'None or at least 0 and below 1'),
    'sync_batch_norm': ([0, 1, 'True', None], 'True or False'),
    'checkpoint_every_steps': ([0, -1, 1e3, '5', None, True], 'a positive integer'),
    'checkpoint_every_secs': ([0, -1, '60', True], 'None or a positive number of seconds'),
    'keep_checkpoints': ([0, -1, 1.0, None, True], 'a positive integer'),
    'keep_every_steps': ([0, -1, 1.5, '5', True], 'None or a positive integer'),
    'save_retry_secs': ([0, -1, '60', None, True, float('inf')], 'a positive number of seconds'),
    'initial_weights': (['', 3, True], 'None or the path of a checkpoint or a file of weights'),
    'bad_example_budget': ([-0.1, 1, '0.1', None, float('nan')], 'at least 0 and below 1'),
    'image_sizes': ([(), 64, ((0, 64.0),), ((1, 64),), ((0, 32), (0, 64)), ((0, 32), (5, 64), (2, 96)), ((0, 0),),
                     ((0,),), (0, 64), ((True, 64),)], 'None or pairs of an epoch and pixels'),
    'eval_every_epochs': ([0, -1, '1', None, True], 'a positive number'),
    'eval_flip': ([0, 1, 'True', None], 'True or False'),
    'eval_precise_batch_norm': ([-1, 1.0, '5', None, True], 'a number of batches, or 0'),
    'log_every_steps': ([0, -1, 1.0, None, True], 'a positive integer'),
    'grace_secs': ([0, -1, '60', None, True, float('inf')], 'a positive number of seconds'),
    'step_timeout_secs': ([0, -1, '60', None, True, float('inf')], 'a positive number of seconds'),
    'allow_config_change': ([0, 1, 'False', None], 'True or False'),
}
WRONG_DATA = {
    'name': (['', None, 3], 'a name'),
    'train_split': (['', None, 3], 'a name'),
    'eval_split': (['', None, 3], 'a name'),
    'default_dir': ([3, ['a']], 'None or a string'),
    'otherwise': ([3, ['a']], 'None or a string'),
    'cache': ([0, 1, 'True', None], 'True or False'),
    'pixel_mean': ([0.5, (0.5, 0.5), (0.5, 0.5, '0.5'), (123.7, 116.3, 103.5), (0.5, -0.1, 0.5), None],
                   'three numbers for R, G, B in 0..1'),
    'pixel_std': ([0.2, (0.2, 0.2, 0.2, 0.2), (0.2, 0.0, 0.2), (58.4, 57.1, 57.4), None],
                  'standard deviations above 0'),
}
WRONG_EVALUATE = {
    'checkpoint': (['', None, 3], "'latest', 'best' or the path"),
    'weights': (['', None, 'both', True], "'raw' or 'ema'"),
}
TABLES = {'train': (Train, WRONG_TRAIN), 'data': (Data, WRONG_DATA), 'evaluate': (Evaluate, WRONG_EVALUATE)}
RIGHT_TRAIN = {'epochs': 2.5, 'global_batch_size': 32, 'model': lambda: None, 'optimizer': lambda: None,
               'schedule': lambda: None}
RIGHT = {'train': RIGHT_TRAIN, 'data': {'name': 'shapes'}, 'evaluate': {}}
CASES = [(root, name, value, right) for root, (_, table) in TABLES.items()
         for name, (values, right) in table.items() for value in values]


@pytest.mark.parametrize(('root', 'name', 'value', 'right'), CASES)
def test_a_wrong_value_gives_one_line_that_helps(root, name, value, right):
    with pytest.raises(ConfigError) as error:
        TABLES[root][0](**{**RIGHT[root], name: value})
    message = str(error.value)
    assert message.startswith(f'{root}.{name} is {value!r}; it must be ')
    assert right in message
    assert '\n' not in message


@pytest.mark.parametrize('root', TABLES)
def test_no_setting_goes_unchecked(root):
    cls, table = TABLES[root]
    assert [field.name for field in dataclasses.fields(cls)] == list(table)


def test_a_gradient_is_clipped_in_one_way():
    with pytest.raises(ConfigError, match='^train.adaptive_clip is 0.01; it must be None where train.clip_norm is set'):
        Train(**{**RIGHT_TRAIN, 'adaptive_clip': 0.01, 'clip_norm': 1.0})


def test_a_model_is_no_factory_of_models():
    """What `@ghostnet()` with parentheses gives can be called, but not without an image."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ConfigError, match='^train.model is .*without parentheses, as @ghostnet'):
        Train(**{**RIGHT_TRAIN, 'model': model})


@pytest.mark.parametrize(
    'right',
    [{'epochs': 1}, {'max_steps': 1}, {'jit': True}, {'jit': False}, {'jit': 'auto'}, {'precision': 'mixed_bfloat16'},
     {'precision': 'mixed_float16'}, {'precision': 'tf32'}, {'all_reduce_dtype': 'bfloat16'},
     {'accumulate': 2}, {'accumulate': 1, 'sync_batch_norm': True},
     {'label_smoothing': 0}, {'label_smoothing': 0.999}, {'clip_norm': 1}, {'adaptive_clip': 0.01}, {'ema_decay': 0.0},
     {'ema_decay': 0.9999},
     {'checkpoint_every_secs': 0.5}, {'eval_every_epochs': 0.25},
     {'mixup_alpha': 0.2, 'cutmix_alpha': 1}, {'erase_probability': 1}, {'erase_probability': 0},
     {'image_sizes': ((0, 64),)}, {'image_sizes': ((0, 32), (2.5, 64))}],
)
def test_right_values_are_taken(right):
    assert dataclasses.asdict(Train(**{**RIGHT_TRAIN, **right})).items() >= right.items()


def test_statistics_are_of_the_whole_batch_or_of_its_parts():
    with pytest.raises(ConfigError, match='^train.accumulate is 2; it must be 1 with train.sync_batch_norm'):
        Train(**RIGHT_TRAIN, accumulate=2, sync_batch_norm=True)


def test_the_edges_of_the_pixel_constants():
    data = Data('shapes', pixel_mean=[0, 0.5, 1], pixel_std=(1, 1e-6, 0.5))
    assert (data.pixel_mean, data.pixel_std) == ([0, 0.5, 1], (1, 1e-6, 0.5))


def test_settings_do_not_change_after_they_were_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Train(**RIGHT_TRAIN).seed = -1
