"""What the tests of the sources share: a source holds what was put there, or says in one line what is wrong."""

import numpy as np
import pytest

import input_pipeline


def assert_data_error(words, name, data_dir, split='train'):
    with pytest.raises(input_pipeline.DataError) as error:
        input_pipeline.open_source(name, data_dir, split)
    message = str(error.value)
    assert '\n' not in message
    for word in words:
        assert str(word) in message, message


def assert_holds(source, examples, num_classes=5):
    assert len(source) == len(examples)
    assert source.num_classes == len(source.class_names) == num_classes
    assert [source[i] for i in range(len(source))] == examples
    order = np.array([3, 1, 3, len(examples) - 1])
    encoded, labels = source.read(order)
    assert list(encoded) == [examples[i][0] for i in order]
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, [examples[i][1] for i in order])
    encoded, labels = source.read(order[:0])
    assert list(encoded) == []
    assert labels.shape == (0,)
    with pytest.raises(IndexError):
        source[len(examples)]
