"""Which checkpoint a run goes back to, where workers see different ones; what a resumed run says of its machine."""

import keras
import pytest
import tensorflow as tf

from trainer import checkpoint
from trainer.optimizer import sgd
from trainer.recipe import Train
from trainer.resume import describe_environment, restore_latest, roll_back
from trainer.state import build_train_state


def build_state(**settings):
    settings = Train(epochs=1, global_batch_size=8, model=len, optimizer=len, schedule=len, **settings)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name='head')])
    return build_train_state(model, sgd()[0], settings), settings


@pytest.mark.parametrize(('is_writer', 'sum_over_workers', 'wanted'), [
    (True, int, 20), (False, lambda value: value + 10, 10)])
def test_all_workers_go_back_to_the_checkpoint_of_worker_0(directory, is_writer, sum_over_workers, wanted):
    state, settings = build_state(rollback_after=3, checkpoint_every_steps=10)
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


def test_what_else_bits_depend_on_warns_where_it_has_changed(directory, monkeypatch, caplog):
    state, _ = build_state()
    strategy = tf.distribute.get_strategy()

    def resume(**changed):
        now = {'fingerprint': {}, **describe_environment(strategy), **changed}
        assert restore_latest(directory, strategy, state, now, False, int)['step'] == 3
        return [record.message for record in caplog.records if 'resume is exact in data, not in bits' in record.message]

    monkeypatch.setenv('TF_ENABLE_ONEDNN_OPTS', '1')
    checkpoint.save(directory, 3, state.variables(), {'fingerprint': {}, **describe_environment(strategy)}, keep=1)
    assert resume() == []
    assert resume(cpu='another')[0].endswith('is another: resume is exact in data, not in bits')
    monkeypatch.setenv('TF_ENABLE_ONEDNN_OPTS', '0')
    assert resume()[-1].startswith('TF_ENABLE_ONEDNN_OPTS was 1, is 0: ')
