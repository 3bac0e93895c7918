"""What the tests of the optimizers share: the shapes of a small network, and when two of its states are near."""

import numpy as np

SHAPES = {'stem/conv/kernel': (3, 3, 2, 4), 'stem/bn/gamma': (4,), 'stem/bn/beta': (4,), 'head/kernel': (4, 5),
          'head/bias': (5,), 'kernel/bias': (3,)}
KERNELS = ('stem/conv/kernel', 'head/kernel')
NUM_STEPS = 50


def assert_near(ours, theirs):
    """Each tensor as one vector, within a few roundings of float32."""
    assert ours.keys() == theirs.keys()
    for path, p in ours.items():
        assert np.linalg.norm(p - theirs[path]) < 1e-6 * np.linalg.norm(theirs[path]), path
