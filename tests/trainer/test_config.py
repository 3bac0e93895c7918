"""Every shipped gin file loads; files, parameters, macros and scopes bind as they say."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from config_harness import BASE, ROOT, difference, load, refusal

import input_pipeline
from trainer import config
from trainer.recipe import ConfigError

RECIPES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob('gin/*.gin'), *ROOT.glob('gin/recipes/*.gin')]
                 if path.name != 'defaults.gin')
HARDWARE = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('gin/hardware/*.gin'))


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


@pytest.mark.parametrize('file', ['gin/recipes/imagenet_rmsprop.gin', 'gin/recipes/imagenet_lamb.gin'])
def test_the_recipes_that_augment(file):
    fingerprint = load(files=[file]).fingerprint
    assert fingerprint['train_dataset.augment'] == '@rand_augment()'
    assert (fingerprint['rand_augment.magnitude'], fingerprint['rand_augment.magnitude_std']) == ('9', '0.5')


@pytest.mark.parametrize(('name', 'settings'), [
    ('rand_augment', ['magnitude', 'magnitude_std', 'num_layers']), ('auto_augment', []),
    ('color_jitter', ['brightness', 'contrast', 'saturation'])])
def test_an_augmentation_changes_images_and_fingerprint(name, settings):
    binding = f'train_dataset.augment=@{name}()'
    assert difference(binding).keys() == {'train_dataset.augment', *(f'{name}.{setting}' for setting in settings)}
    images = np.arange(8 * 40 * 50 * 3).astype(np.uint8).reshape(8, 40, 50, 3)
    source = input_pipeline.array_source(images, np.arange(8))
    plain, augmented = (
        next(iter(load(*params).train_dataset(source, global_batch_size=8)))['image'] for params in ([], [binding]))
    assert (plain.numpy() != augmented.numpy()).any(axis=(1, 2, 3)).sum() > 2


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


def test_what_is_written_down_already_is_left_alone(tmp_path, monkeypatch):
    """A run must resume on a disk that is full."""
    load().write(tmp_path)

    def full(*_):
        raise OSError('no space left')

    monkeypatch.setattr(Path, 'write_text', full)
    load().write(tmp_path)
    with pytest.raises(ConfigError, match='no space left'):
        load('train.seed=1').write(tmp_path)


def comparable(settings):
    """The fields; a reference to a configurable is made anew by each load and has only its name in common."""
    return {name: getattr(value, 'args', [value])[0].__name__ if callable(value) else value
            for name, value in dataclasses.asdict(settings).items()}


def test_the_operative_text_has_the_defaults_that_were_taken():
    load()
    assert 'train.seed = 0' in config.gin.operative_config_str()
    assert 'train.epochs = 360' in config.gin.operative_config_str()
