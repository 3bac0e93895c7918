"""Every shipped gin file loads; every mistake in one gives one line; the fingerprint says what a resume must match."""

import dataclasses
import difflib
import inspect
import logging
import pathlib

import pytest
import tensorflow as tf

from trainer import config, recipe
from trainer.recipe import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob('gin/*.gin'), *ROOT.glob('gin/recipes/*.gin')]
                 if path.name != 'defaults.gin')
HARDWARE = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('gin/hardware/*.gin'))
BASE = ['gin/imagenet.gin']


def load(*params, files=BASE):
    return config.load(files, params)


def refusal(*params, files=BASE):
    """The message of the ConfigError, which has one line."""
    with pytest.raises(ConfigError) as error:
        config.load(files, params)
    message = str(error.value)
    assert '\n' not in message
    return message


def difference(*params, files=BASE):
    """{key: value} of what these bindings change in the fingerprint."""
    changed, before = load(*params, files=files).fingerprint, load(files=files).fingerprint
    return {key: changed.get(key) for key in {*changed, *before} if changed.get(key) != before.get(key)}


@pytest.fixture
def write(tmp_path):
    """write(text, name) -> path of a gin file."""
    def write(text, name='x.gin'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def assert_complete(loaded):
    """The parts can be made, and the values in them are right."""
    init, update = loaded.train.optimizer()
    assert callable(init) and callable(update)
    rate = loaded.train.schedule(num_steps=10**6, steps_per_epoch=1000.0, global_batch_size=256)
    assert float(rate(tf.constant(10**6 // 2))) > 0
    assert loaded.data.name
    assert loaded.fingerprint['train.seed'] == repr(loaded.train.seed)


# ---- What is shipped ----

def test_there_are_files_to_load():
    assert {'gin/imagenet.gin', 'gin/quickstart.gin'} <= set(RECIPES)
    assert 'gin/hardware/mirrored.gin' in HARDWARE


@pytest.mark.parametrize('file', RECIPES)
def test_every_recipe_loads(file):
    assert_complete(load(files=[file]))


@pytest.mark.parametrize('file', HARDWARE)
def test_every_hardware_file_loads_after_a_recipe(file):
    assert_complete(load(files=['gin/imagenet.gin', file]))


@pytest.mark.parametrize('file', RECIPES + HARDWARE)
def test_files_are_found_from_any_directory_in_silence(file, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        load(files=['gin/imagenet.gin', file] if file in HARDWARE else [file])
    assert caplog.records == []


def test_imagenet_says_what_it_says():
    loaded = load()
    assert (loaded.train.epochs, loaded.train.global_batch_size, loaded.train.label_smoothing) == (360, 2048, 0.1)
    assert loaded.data.name == 'tfds:imagenet2012'
    assert loaded.train_dataset is not loaded.eval_dataset


def test_the_bindings_that_always_exist():
    """Names and defaults of the public contract: bound to their defaults they change nothing."""
    assert difference('train.seed=0', 'train.max_steps=None', 'train.steps_per_loop=100', "train.jit='auto'",
                      "train.precision='float32'", 'train.accumulate=1', 'train.clip_norm=None',
                      'train.adaptive_clip=None', 'train.ema_decay=None', 'train.sync_batch_norm=False',
                      'train.checkpoint_every_secs=None', 'train.keep_checkpoints=3',
                      'train.eval_every_epochs=1', 'train.allow_config_change=False', "data.train_split='train'",
                      "evaluate.checkpoint='latest'", "evaluate.weights='raw'", "build_strategy.name='auto'",
                      'build_strategy.num_devices=None', 'ghostnet.version=1', 'ghostnet.dropout=None') == {}


# ---- Files and parameters ----

def test_the_current_directory_comes_before_the_repository(write, tmp_path, monkeypatch):
    write("include 'gin/quickstart.gin'\ntrain.epochs = 3\n", 'gin/imagenet.gin')
    monkeypatch.chdir(tmp_path)
    loaded = load()
    assert (loaded.data.name, loaded.train.epochs) == ('shapes', 3)


def test_later_files_win_and_parameters_win_over_files(write):
    files = [*BASE, write('train.epochs = 3\ntrain.seed = 3\n', 'a.gin'), write('train.seed = 4\n', 'b.gin')]
    assert (load(files=files).train.epochs, load(files=files).train.seed) == (3, 4)
    assert load('train.seed=5', 'train.seed = 6', files=files).train.seed == 6
    assert load(files=[*BASE, files[2], files[1]]).train.seed == 3


def test_a_run_without_any_file():
    loaded = load("data.name='shapes'", 'train.epochs=1', 'train.global_batch_size=8', 'cosine.peak_rate=0.1', files=[])
    assert loaded.train.global_batch_size == 8


def test_loading_again_forgets_what_was_loaded_before(write):
    first = load()
    macros = write('RATE = 0.3\ncosine.peak_rate = %RATE\na/sgd.momentum = 0.5\ntrain.optimizer = @a/sgd\n')
    assert load('train.seed=1', files=[*BASE, macros]).train.seed == 1
    assert 'train' in refusal('train.epochs=0')
    assert 'nope' in refusal('train.nope=1')
    again = load()
    assert again.fingerprint == first.fingerprint
    assert again.text == first.text
    assert again.train.seed == 0


def test_macros(write):
    files = [*BASE, write('CLASSES = 10\nghostnet.num_classes = %CLASSES\nMEAN = (0.5, 0.5, %HALF)\nHALF = 0.25\n'
                          'data.pixel_mean = %MEAN\n')]
    loaded = load(files=files)
    assert loaded.data.pixel_mean == (0.5, 0.5, 0.25)
    # As if the values stood where the macros do: they say nothing of how a value was written.
    written_out = load('ghostnet.num_classes=10', 'data.pixel_mean=(0.5, 0.5, 0.25)')
    assert loaded.fingerprint == written_out.fingerprint
    assert difference('HALF=0.125', files=files) == {'data.pixel_mean': '(0.5, 0.5, 0.125)'}


def velocity(loaded):
    """The second velocity after a gradient of 1 and one of 0: the momentum."""
    init, update = loaded.train.optimizer()
    one, zero = {'bias': tf.ones([])}, {'bias': tf.zeros([])}
    _, slots = update(one, init(one), one, 0.1, 0)
    _, slots = update(zero, slots, one, 0.1, 1)
    return float(slots['momentum']['bias'])


def test_scopes():
    assert velocity(load()) == pytest.approx(0.9)
    loaded = load('low/sgd.momentum=0.5', 'train.optimizer=@low/sgd')
    assert velocity(loaded) == 0.5
    assert loaded.fingerprint['low/sgd.momentum'] == '0.5'
    # A scope falls back on what is bound in the scopes around it, and on what is bound in none.
    assert velocity(load('train.optimizer=@low/sgd')) == pytest.approx(0.9)
    assert velocity(load('low/sgd.momentum=0.25', 'low/er/sgd.nesterov=True', 'train.optimizer=@low/er/sgd')) == 0.25


def test_what_a_run_writes_down_gives_the_same_run(write):
    """config.gin of a workdir, taken as the recipe of another run."""
    for file in RECIPES:
        loaded = load('train.seed=3', files=[file])
        again = load(files=[write(loaded.text)])
        assert again.fingerprint == loaded.fingerprint
        for part in ('train', 'data', 'evaluate'):
            assert comparable(getattr(again, part)) == comparable(getattr(loaded, part))


def comparable(settings):
    """The fields; a reference to a configurable is made anew by each load and has only its name in common."""
    return {name: value.__name__ if callable(value) else value for name, value in dataclasses.asdict(settings).items()}


def test_the_operative_text_has_the_defaults_that_were_taken():
    load()
    assert 'train.seed = 0' in config.operative_text()
    assert 'train.epochs = 360' in config.operative_text()


# ---- Mistakes ----

@pytest.mark.parametrize(
    ('param', 'unknown', 'nearest'),
    [
        ('ghostnets.width=1', 'ghostnets', 'ghostnet'),
        ('tarin.epochs=1', 'tarin', 'train'),
        ('ghostnet.widht=1', 'widht', 'ghostnet.width'),
        ('train.lable_smoothing=0.1', 'lable_smoothing', 'train.label_smoothing'),
        ('train_dataset.imagesize=64', 'imagesize', 'train_dataset.image_size'),
        ('a/sgd.momentun=0.5', 'momentun', 'sgd.momentum'),
        ('train.model=@ghostnetv1', 'ghostnetv1', 'ghostnet'),
        ('train_dataset.crop=@random_resize_crop()', 'random_resize_crop', 'random_resized_crop'),
        ('train.schedule=@a/cosin', 'cosin', 'cosine'),
    ],
)
def test_an_unknown_name_suggests_the_nearest(param, unknown, nearest):
    message = refusal(param)
    assert message.startswith(f"--gin_param='{param}': ")
    assert unknown in message
    assert message.endswith(f'; did you mean {nearest}?')


@pytest.mark.parametrize(('param', 'some'), [('zzzz.x=1', ['train', 'ghostnet', 'cosine']),
                                             ('train.zzzz=1', ['train.epochs', 'train.log_every_steps']),
                                             ('train.model=@zzzz', ['train', 'ghostnet', 'cosine'])])
def test_a_name_like_no_other_lists_what_there_is(param, some):
    message = refusal(param)
    listed = message.rsplit('; there are ', 1)[1].split(', ')
    assert set(some) <= set(listed)
    assert difflib.get_close_matches('zzzz', listed) == []


def test_an_unknown_name_in_a_file_has_its_line(write):
    file = write('train.seed = 1\n\nghostnet.widht = 1\n')
    assert refusal(files=[*BASE, file]).startswith(f'{file}: line 3: ')


@pytest.mark.parametrize('param', ['train_dataset.source=3', 'train_dataset.seed=3', 'train_dataset.num_shards=2',
                                   'eval_dataset.global_batch_size=3', 'cosine.num_steps=3',
                                   'linear.global_batch_size=3'])
def test_what_a_run_gives_itself_cannot_be_bound(param):
    message = refusal(param)
    assert param.split('=')[0].split('.')[1] in message
    assert message.endswith('the run gives it')


@pytest.mark.parametrize(
    ('params', 'name'),
    [
        (['random_shift.max_shift=2'], 'random_shift.max_shift'),
        (['article_ghostnet.apply_se=False'], 'article_ghostnet.apply_se'),
        (['low/sgd.momentum=0.5'], 'low/sgd.momentum'),
        (['train_dataset.crop=@random_shift()'], 'random_resized_crop.scale'),  # which imagenet.gin binds
        (['high/train.seed=1'], 'high/train.seed'),
    ],
)
def test_a_binding_that_nothing_uses_is_refused_by_name(params, name):
    message = refusal(*params)
    owner = name.rsplit('.', 1)[0]
    assert message.startswith(f'{name} is bound, but nothing uses {owner}')
    assert f'@{owner}' in message


def test_a_binding_is_used_where_it_is_referred_to():
    params = ['random_shift.max_shift=3', 'train_dataset.crop=@random_shift()']
    files = ['gin/recipes/fashion_mnist_reference.gin']
    assert difference(*params, files=files) == {'random_shift.max_shift': '3'}


def test_a_macro_that_nothing_uses_is_refused_by_name():
    assert refusal('RATE=3').startswith('the macro RATE is set, but nothing uses it')


def test_a_macro_that_is_not_set_is_refused_by_name():
    message = refusal('train.seed=%SEED')
    assert '%SEED is used' in message and 'SEED = value' in message


def test_a_missing_file(tmp_path):
    for file in ('nope.gin', str(tmp_path / 'nope.gin'), str(tmp_path)):
        message = refusal(files=[*BASE, file])
        assert message.startswith(f'no file {file}: ')
        assert 'current directory' in message and str(ROOT) in message


def test_a_missing_included_file(write, caplog):
    file = write("include 'nope.gin'\n")
    message = refusal(files=[file])
    assert message.startswith(file) and 'nope.gin' in message
    assert caplog.records == []


@pytest.mark.parametrize(
    ('text', 'line', 'words'),
    [
        ('train.seed = 1\ntrain.epochs = \n', 2, 'Unable to parse value'),
        ('train.seed = 1\n\nfoo bar\n', 3, "expected ':' or '='"),
        ("data.name = 'shapes'\ndata.eval_split = test\n", 2, 'test is no value'),
        ('train.seed = (1 2)\n', 1, "Expected ',' or ')'"),
        ('train.seed = 1\ndata.pixel_mean = (0.5,\n', 3, 'a bracket or a quote is not closed'),
        ('train.seed = 1 train.epochs = 2\n', 1, 'Expected newline'),
    ],
)
def test_a_syntax_error_has_file_and_line(write, text, line, words):
    file = write(text)
    message = refusal(files=[*BASE, file])
    assert message.startswith(f'{file}: line {line}: ')
    assert words in message


def test_a_syntax_error_in_an_included_file_names_that_one(write, tmp_path, monkeypatch):
    write('train.seed = 1\ntrain.seed = nope\n', 'inner.gin')
    outer = write("include 'inner.gin'\n", 'outer.gin')
    monkeypatch.chdir(tmp_path)
    assert refusal(files=[*BASE, outer]).startswith('inner.gin: line 2: nope is no value')


def test_a_syntax_error_in_a_parameter_quotes_it():
    assert refusal('ghostnet.width 0.5').startswith("--gin_param='ghostnet.width 0.5': ")
    message = refusal('data.name=shapes')
    assert message.startswith("--gin_param='data.name=shapes': ")
    assert 'shapes is no value' in message and 'strings in quotes' in message


NEEDED = {'train.epochs': '1', 'train.global_batch_size': '8', 'data.name': "'shapes'", 'cosine.peak_rate': '0.1'}


@pytest.mark.parametrize('name', NEEDED)
def test_a_value_without_default_must_be_bound(name):
    """Of the roots and of the parts that are referred to."""
    params = [f'{other}={value}' for other, value in NEEDED.items() if other != name]
    message = refusal(*params, files=[])
    assert message.startswith(f'{name} has no value')
    assert '--gin_file' in message and f"--gin_param='{name}=...'" in message


@pytest.mark.parametrize(
    ('param', 'start'),
    [
        ('train.epochs=0', 'train.epochs is 0; it must be a positive number'),
        ("train.precision='float16'",
         "train.precision is 'float16'; it must be 'float32', 'tf32', 'mixed_bfloat16' or 'mixed_float16'"),
        ('train.optimizer=@sgd()', 'train.optimizer is '),
        ('data.pixel_std=(58, 57, 57)', 'data.pixel_std is (58, 57, 57); '),
        ("evaluate.weights='best'", "evaluate.weights is 'best'; "),
    ],
)
def test_a_wrong_value_of_a_root_is_refused_at_once(param, start):
    assert refusal(param).startswith(start)


# ---- Fingerprint ----

LEFT_OUT = {'train.max_steps': '5', 'train.steps_per_loop': '5', 'train.jit': 'True',
            'train.checkpoint_every_steps': '5', 'train.checkpoint_every_secs': '5', 'train.keep_checkpoints': '5',
            'train.log_every_steps': '5', 'train.eval_every_epochs': '5', 'train.eval_flip': 'True',
            'train.eval_precise_batch_norm': '5',
            'train.keep_every_steps': '5', 'train.save_retry_secs': '5', 'train.bad_example_budget': '0.1',
            'train.max_rollbacks': '5', 'train.grace_secs': '5', 'train.step_timeout_secs': '5',
            'train.allow_config_change': 'True',
            'data.default_dir': "'/elsewhere'", 'data.otherwise': "'shapes'", 'build_strategy.name': "'mirrored'",
            'build_strategy.num_devices': '2', 'build_strategy.op_threads': '1', 'build_strategy.timeout_secs': '5',
            'evaluate.checkpoint': "'best'", 'evaluate.weights': "'ema'"}
TAKEN_IN = {'train.seed': '1', 'train.epochs': '90', 'train.global_batch_size': '64', 'train.label_smoothing': '0.2',
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
