"""Which checkpoint a run goes back to, where workers see different ones."""

import keras
import pytest

from trainer import checkpoint
from trainer.optimizer import sgd
from trainer.recipe import Train
from trainer.resume import roll_back
from trainer.state import build_train_state


@pytest.mark.parametrize(('is_writer', 'sum_over_workers', 'wanted'), [
    (True, int, 20), (False, lambda value: value + 10, 10)])
def test_all_workers_go_back_to_the_checkpoint_of_worker_0(directory, is_writer, sum_over_workers, wanted):
    settings = Train(epochs=1, global_batch_size=8, model=len, optimizer=len, schedule=len, rollback_after=3,
                     checkpoint_every_steps=10)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name='head')])
    state = build_train_state(model, sgd()[0], settings)
    for step in (10, 20, 25):  # the last one is not periodic
        state.step.assign(step)
        checkpoint.save(directory, step, state.variables(), {}, keep=5)
    state.step.assign(27)
    state.position.assign(27 * 8)
    state.guard['skips_in_a_row'].assign(4)  # one more than are needed
    meta = roll_back(directory, state, settings, 27, is_writer, sum_over_workers)
    assert meta['step'] == int(state.step) == wanted
    assert int(state.position) == 26 * 8 and int(state.guard['rollbacks']) == 1
    assert meta['report'] == {'train/rollbacks': 1, 'train/rollback_from_step': 26, 'train/rollback_position': 26 * 8}
