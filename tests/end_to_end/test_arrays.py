"""trainer.train fits a model to arrays, in and out of a strategy's scope, and resumes where it is given a workdir."""

import few_blocks
import keras
import numpy as np
import pytest
import tensorflow as tf

import trainer
from ghostnet import GhostNet, ghostnet
from trainer.recipe import ConfigError

NUM_TRAIN, NUM_EVAL, CLASSES = 96, 30, 3


@pytest.fixture(autouse=True)
def small_networks_of_the_same_weights(monkeypatch):
    """The caller of trainer.train builds the model, so that train.seed comes too late for its weights."""
    monkeypatch.setattr('ghostnet.model.BLOCKS', few_blocks.few_blocks())
    keras.utils.set_random_seed(1)


def separable(count, seed):
    """Noise around one random picture a class."""
    pictures = np.random.default_rng(0).integers(40, 216, (CLASSES, 32, 32, 3))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    return (pictures[labels] + rng.integers(-40, 40, (count, 32, 32, 3))).astype(np.uint8), labels


def fit(model, **settings):
    # Ten epochs: after five, two replicas of the whole network end between 67 and 100 %, as the last bits of sums fall.
    return trainer.train(model, *separable(NUM_TRAIN, 1), epochs=10, global_batch_size=16,
                         eval_data=separable(NUM_EVAL, 2), eval_every_epochs=10, peak_rate=0.05, warmup_epochs=1,
                         **settings)


def assert_fits(model, result):
    assert result['eval/top1'] >= 0.9 and result['eval/examples'] == NUM_EVAL
    assert {'train/loss', 'train/top1', 'train/learning_rate', 'eval/loss', 'eval/top5'} <= result.keys()
    # Trained in place: the caller's model classifies as the metrics say.
    images, labels = separable(NUM_EVAL, 2)
    logits = model((images / np.float32(255) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], training=False)
    assert np.mean(np.argmax(logits, 1) == labels) == pytest.approx(result['eval/top1'])


def test_fits_what_can_be_told_apart_and_resumes(tmp_path):
    model = ghostnet(CLASSES, 0.25, image_size=None)
    result = fit(model, workdir=tmp_path)
    assert_fits(model, result)
    again = ghostnet(CLASSES, 0.25, image_size=None)
    assert fit(again, workdir=tmp_path) == result
    for weight, other in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, other)
    with pytest.raises(ConfigError, match='another recipe'):
        fit(again, workdir=tmp_path, label_smoothing=0.1)
    assert fit(again, workdir=tmp_path, steps_per_loop=7, keep_checkpoints=1) == result  # which no result depends on


def test_models_that_cannot_be_trained_as_they_are():
    with pytest.raises(ConfigError, match="built as float32, but train.precision is 'mixed_bfloat16'"):
        fit(ghostnet(CLASSES, 0.25, image_size=None), precision='mixed_bfloat16')
    images = keras.Input((32, 32, 3))
    features = keras.layers.Dropout(0.1)(keras.layers.Flatten()(images))
    with pytest.raises(ConfigError, match='seed_generator_state.*KeyedDropout'):
        fit(keras.Model(images, keras.layers.Dense(CLASSES)(features)))


def test_inside_the_scope_of_a_strategy():
    # Apart from other strategies of this process, which would use the same keys for their collectives.
    tf.distribute.MirroredStrategy._collective_key_base += 100_000
    strategy = tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'])
    tf.distribute.MirroredStrategy._collective_key_base += 100_000
    with strategy.scope():
        model = GhostNet(CLASSES, 0.25)
        assert_fits(model, fit(model))
