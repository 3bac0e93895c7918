"""What the tests of the configuration share: to load a recipe, the one line of a refusal, what a binding changes."""

import pathlib

import pytest

from trainer import config
from trainer.recipe import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASE = ['gin/imagenet.gin']
NEEDED = {'train.epochs': '1', 'train.global_batch_size': '8', 'data.name': "'shapes'", 'cosine.peak_rate': '0.1'}


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
