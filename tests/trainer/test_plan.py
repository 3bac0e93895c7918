"""At which steps of a run something is done."""

import math

import pytest

from trainer.plan import make_plan, next_multiple
from trainer.recipe import ConfigError, Train


def plan_of(num_examples=42, has_evaluation=True, **settings):
    settings = {'epochs': 2.5, 'global_batch_size': 8, 'log_every_steps': 10, 'checkpoint_every_steps': 4, **settings}
    return make_plan(Train(model=len, optimizer=len, schedule=len, **settings), num_examples, has_evaluation)


@pytest.mark.parametrize('every', [1, 3, 5.25, 0.75, 1281167 / 1024])
def test_next_multiple_is_the_first_step_at_which_another_is_done(every):
    for step in range(4000):
        after = next_multiple(step, every)
        assert after > step
        done = [math.floor(s / every + 1e-9) for s in range(step, after + 1)]
        assert done[-1] > done[0] and all(count == done[0] for count in done[1:-1])


def test_every_step_at_which_something_is_done_is_a_stop():
    plan = plan_of(image_sizes=((0, 24), (1.5, 32)))
    assert (plan.num_steps, plan.last_step, plan.steps_per_epoch) == (13, 13, 5.25)
    step, stops = 0, []
    while step < plan.last_step:
        step = plan.next_stop(step, 100)
        stops.append(step)
    assert stops == [4, 6, 8, 10, 11, 12, 13]  # saves, evaluations after each epoch, a size at 8, a report at 10
    assert [s for s in range(1, 14) if plan.is_eval_step(s)] == [6, 11, 13]
    assert [s for s in range(1, 14) if plan.is_report_step(s)] == [6, 10, 11, 13]
    assert plan.next_stop(0, 3) == 3


def test_without_evaluation_and_stopped_early():
    plan = plan_of(has_evaluation=False, max_steps=7)
    assert (plan.num_steps, plan.last_step) == (13, 7)
    assert not any(plan.is_eval_step(s) for s in range(1, 8))
    assert plan.next_stop(4, 100) == 7


def test_less_than_a_step():
    with pytest.raises(ConfigError, match=r'train.epochs is 0.1: with 42 examples'):
        plan_of(epochs=0.1)
