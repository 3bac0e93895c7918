"""A checkpoint damaged in any file, in any bit, is found and named, and the one before it is taken."""

import json
import logging
import os
import shutil

import pytest
from checkpoint_harness import FILES, META, names, read, save, variables_of

from trainer import checkpoint
from trainer.recipe import ConfigError


def flip_a_bit(path, place=-1, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(bytes(content))


DAMAGES = {
    'flipped bit': flip_a_bit,
    'truncated': lambda path: os.truncate(path, path.stat().st_size // 2),
    'empty': lambda path: os.truncate(path, 0),
    'missing': lambda path: path.unlink(),
}


@pytest.mark.parametrize('file', FILES)
@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(directory, caplog, file, damage):
    good, bad = save(directory, 10), save(directory, 20)
    DAMAGES[damage](bad / file)
    assert file in checkpoint.find_damage(bad)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest_valid(directory) == good
    assert read(good) == 10
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert str(bad) in record.getMessage()
    assert file in record.getMessage()


def test_sound_ones_give_no_warning(directory, caplog):
    path = save(directory, 10)
    assert checkpoint.find_damage(path) == ''
    assert checkpoint.latest_valid(directory) == path
    assert caplog.records == []


def test_several_damaged_ones_are_passed_over(directory, caplog):
    paths = [save(directory, step) for step in (10, 20, 30)]
    flip_a_bit(paths[1] / 'state.index')
    shutil.rmtree(paths[2])
    paths[2].mkdir()
    assert checkpoint.latest_valid(directory) == paths[0]
    assert [str(path) in record.getMessage() for path, record in zip(paths[:0:-1], caplog.records, strict=True)] == [
        True, True]


def test_none_is_left(directory):
    flip_a_bit(save(directory, 10) / 'state.index')
    with pytest.raises(ConfigError, match='all 1 checkpoints in .* are damaged'):  # never anew in silence
        checkpoint.latest_valid(directory)


def test_any_flipped_bit_is_found(directory):
    """In each byte of each file, meta.json included, which says what the run is."""
    path = save(directory, 7)
    for name in FILES:
        sound = (path / name).read_bytes()
        for place in range(len(sound)):
            flip_a_bit(path / name, place, place % 8)
            assert checkpoint.find_damage(path), (name, place)
            (path / name).write_bytes(sound)
    assert checkpoint.find_damage(path) == ''


def test_a_checkpoint_that_names_no_files_is_none(directory):
    path = save(directory, 7)
    (path / 'meta.json').write_text(json.dumps({**META, 'step': 7, 'sha256': {}}))
    assert checkpoint.find_damage(path) == 'meta.json names no file'


def test_after_a_fall_back_the_damaged_step_is_made_again(directory, caplog):
    save(directory, 10)
    flip_a_bit(save(directory, 20) / 'state.index')
    assert read(checkpoint.latest_valid(directory)) == 10
    caplog.clear()
    path = save(directory, 20, value=21)
    assert checkpoint.latest_valid(directory) == path
    assert read(path) == 21
    assert caplog.records == []


def test_after_a_fall_back_damaged_ones_of_later_steps_go_first(directory):
    for step in (10, 20, 30):
        save(directory, step)
    flip_a_bit(directory / 'ckpt-00000030' / 'state.index')
    checkpoint.save(directory, 25, variables_of(25), META, keep=2, periodic=10)
    assert names(directory) == ['checkpoint', 'ckpt-00000020', 'ckpt-00000025']
