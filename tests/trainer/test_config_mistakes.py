"""Every mistake in a gin file or a parameter gives one line, which says where it is and what is near."""

import difflib

import pytest
from config_harness import BASE, NEEDED, ROOT, difference, load, refusal

from trainer.recipe import ConfigError


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


@pytest.mark.parametrize(('part', 'other', 'arguments'), [
    ('optimizer', 'cosine', {}), ('schedule', 'sgd', {'num_steps': 9, 'steps_per_epoch': 3.0, 'global_batch_size': 8}),
    ('model', 'lamb', {'width': 3})])
def test_a_part_in_another_ones_place_is_refused_in_one_line(part, other, arguments):
    params = [f'{key}={value}' for key, value in NEEDED.items() if (part, key) != ('schedule', 'cosine.peak_rate')]
    settings = load(f'train.{part}=@{other}', *params, files=[]).train
    with pytest.raises(ConfigError) as error:
        getattr(settings, part)(**arguments)
    assert other in str(error.value) and '\n' not in str(error.value)
