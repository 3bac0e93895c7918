"""A run may change the number of its replicas at any restart: the same batches, and but for rounding the same curve."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from step_harness import CLASSES, small_network
from workdir_reader import reports, tensors

import input_pipeline
from trainer import loop
from trainer.optimizer import sgd
from trainer.recipe import Data, Train
from trainer.schedule import cosine
from trainer.strategy import build_strategy

NUM_STEPS, BATCH, SIZE = 16, 16, 32


def source():
    rng = np.random.default_rng(0)
    return input_pipeline.array_source(rng.integers(0, 255, (70, 40, 40, 3), np.uint8), rng.integers(0, CLASSES, 70),
                                       CLASSES)


def train(workdir, num_replicas, until, seen):
    """Trains to step `until` and adds the batches that the devices were given to `seen`."""
    def dataset(*args, **kwargs):
        def note(index, image):
            seen.append((index.copy(), image.copy()))

        def noted(batch):
            with tf.control_dependencies([tf.numpy_function(note, [batch['index'], batch['image']], [])]):
                return {key: tf.identity(value) for key, value in batch.items()}

        return input_pipeline.train_dataset(*args, image_size=SIZE, **kwargs).map(noted)

    # Strategies of one process would use the same keys for their collectives.
    tf.distribute.MirroredStrategy._collective_key_base += 100_000
    strategy = build_strategy('mirrored' if num_replicas > 1 else 'one_device', num_replicas)
    tf.distribute.MirroredStrategy._collective_key_base += 100_000
    settings = Train(
        epochs=NUM_STEPS * BATCH / 70 + 0.01, global_batch_size=BATCH, model=small_network,
        optimizer=functools.partial(sgd, weight_decay=1e-4), schedule=functools.partial(cosine, 0.01), max_steps=until,
        sync_batch_norm=True, ema_decay=0.9, steps_per_loop=3, log_every_steps=1, checkpoint_every_steps=5)
    loop.train(settings, Data('arrays'), strategy=strategy, train_source=source(), eval_source=None,
               train_dataset=dataset, eval_dataset=input_pipeline.eval_dataset, workdir=workdir, fingerprint={},
               write_config=lambda workdir: None)


def test_one_two_four_and_one_replicas(tmp_path, caplog):
    alone, seen_alone, changing, seen = tmp_path / 'alone', [], tmp_path / 'changing', []
    train(alone, 1, NUM_STEPS, seen_alone)
    for num_replicas, until in ((1, 3), (2, 8), (4, 13), (1, NUM_STEPS)):
        del seen[len(reports(changing)) if changing.exists() else 0:]  # what was read ahead
        train(changing, num_replicas, until, seen)
    assert 'num_replicas was 1, is 2' in caplog.text and 'num_replicas was 4, is 1' in caplog.text
    for step in range(NUM_STEPS):
        for found, wanted in zip(seen[step], seen_alone[step], strict=True):
            np.testing.assert_array_equal(found, wanted)
    lines, wanted = reports(changing), reports(alone)
    assert [line['step'] for line in lines] == list(range(1, NUM_STEPS + 1))
    for line, other in zip(lines, wanted, strict=True):
        assert line['train/loss'] == pytest.approx(other['train/loss'], rel=1e-4)
    values, others = tensors(changing), tensors(alone)
    assert values['position'] == others['position'] == NUM_STEPS * BATCH
    vectors = [np.concatenate([np.ravel(v[name]) for name in others if name.startswith('params/')])
               for v in (values, others)]
    assert np.linalg.norm(vectors[0] - vectors[1]) < 1e-5 * np.linalg.norm(vectors[1])
