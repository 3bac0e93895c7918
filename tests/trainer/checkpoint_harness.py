"""What the tests of checkpoints share: variables that tell which save they are of, saved and read."""

import numpy as np
import tensorflow as tf

from trainer import checkpoint

META = {'fingerprint': {'train.seed': '0'}, 'tensorflow': tf.__version__, 'threads': [2, 2]}
FILES = ('meta.json', 'state.data-00000-of-00001', 'state.index')


def variables_of(value):
    """Variables of several types and ranks that all tell which save they are of."""
    return {'step': tf.Variable(value, dtype=tf.int64), 'position': tf.Variable(10 * value, dtype=tf.int64),
            'params/head/kernel': tf.Variable(tf.fill([2, 3], float(value))),
            'batch_stats/bn/moving_mean': tf.Variable(tf.fill([3], value + 0.5)),
            'slots/momentum/head/kernel': tf.Variable(tf.fill([2, 3], -float(value)))}


def save(directory, step, keep=3, value=None):
    return checkpoint.save(directory, step, variables_of(step if value is None else value), META, keep=keep)


def read(path):
    """Reads all tensors, checks that they are of one save, and returns which."""
    tensors = checkpoint.load(path, variables_of(0))
    value = int(tensors['step'])
    for name, variable in variables_of(value).items():
        np.testing.assert_array_equal(tensors[name], variable.numpy())
        assert tensors[name].dtype == variable.dtype
    return value


def names(directory):
    return sorted(path.name for path in directory.iterdir())
