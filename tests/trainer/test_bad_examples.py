"""Bad examples are named once, where and why, and end the run when there are too many."""

import json

import numpy as np
import pytest

from input_pipeline import Source
from trainer.bad_examples import BadExamples
from trainer.recipe import ConfigError

NO_IMAGE = b'<html>404 not found</html>'


@pytest.fixture
def source():
    return Source('a source', 1000, ['a'],
                  lambda indices: ([NO_IMAGE] * len(indices), np.zeros(len(indices), np.int32)), lambda i: f'file {i}',
                  lambda i: 'label 7 is out of range' if i == 7 else '')


def in_turn(write):
    write()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_is_written_once_when_its_position_has_been_trained_on(tmp_path, source, caplog):
    path = tmp_path / 'bad_examples.jsonl'
    bad = BadExamples(path, 0.01, in_turn, source)
    assert bad.metrics() == {}
    for position, index in ((30, 5), (10, 7), (130, 5), (90, 8)):  # from many threads, in any order
        bad.found(position, index)
    assert bad.settle(80) == 2
    assert lines(path) == [
        {'source': 'a source', 'index': 7, 'reason': 'label 7 is out of range'},
        {'source': 'a source', 'index': 5, 'reason': "no JPEG, PNG, GIF or BMP: it begins with b'<html>404 no'"}]
    assert 'file 5 (example 5)' in caplog.text and 'file 8' not in caplog.text
    assert bad.settle(200) == 3 and [line['index'] for line in lines(path)] == [7, 5, 8]
    assert bad.metrics() == {'train/bad_examples': 3}


def test_a_resumed_run_knows_them(tmp_path, source):
    path = tmp_path / 'bad_examples.jsonl'
    path.write_bytes(b'{"source": "another", "index": 1, "reason": "x"}\n'
                     b'{"source": "a source", "index": 5, "reason": "x"}\n[1]\n{}\n\xff\n{"source": "a sou')
    bad = BadExamples(path, 0.001, in_turn, source)
    bad.found(1000, 5)
    assert bad.settle(2000) == 1 and path.read_bytes().count(b'\n') == 5


def test_more_than_the_budget_end_the_run(tmp_path, source):
    path = tmp_path / 'bad_examples.jsonl'
    bad = BadExamples(path, 0.002, in_turn, source)
    bad.found(0, 1), bad.found(1, 2)
    assert bad.settle() == 2
    bad.found(2, 3)
    with pytest.raises(ConfigError) as error:
        bad.settle()
    assert '\n' not in str(error.value)
    for word in ('3 of the 1000', 'a source', 'train.bad_example_budget = 0.002', str(path), 'file 1 (example 1)'):
        assert word in str(error.value)
    assert len(lines(path)) == 3


def test_without_a_file_they_are_counted(source, tmp_path):
    bad = BadExamples(None, 0.0, in_turn, source)
    bad.found(0, 1)
    with pytest.raises(ConfigError, match='1 of the 1000'):
        bad.settle()
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_does_not_end_the_run(source, tmp_path, caplog):
    bad = BadExamples(tmp_path / 'missing' / 'bad_examples.jsonl', 0.01, in_turn, source)
    bad.found(0, 1)
    assert bad.settle() == 1 and 'cannot be written' in caplog.text
