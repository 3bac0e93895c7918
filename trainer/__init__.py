"""Training of GhostNet-class networks under tf.distribute. `trainer.train` trains a Keras model on arrays.

Imports nothing until asked: `python -m trainer.main` imports this first, and sets its process up before TensorFlow.
"""


def __getattr__(name):
    if name == 'train':
        from trainer.arrays import train
        return train
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
