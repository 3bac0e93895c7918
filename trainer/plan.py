"""How many steps a run has, and at which of them something else is done: pure arithmetic."""
from dataclasses import dataclass

from trainer.recipe import ConfigError, Train


@dataclass(frozen=True)
class Plan:
    """The steps of a run."""

    settings: Train
    steps_per_epoch: float
    num_steps: int  # of all epochs, which the schedule runs over
    last_step: int  # where this run ends
    eval_every: float | None  # steps between two evaluations, which need not be whole; None: nothing is evaluated
    resizes: frozenset[int]  # the steps after which the size of the training images changes

    def is_eval_step(self, step: int) -> bool:
        return self.eval_every is not None and step in (next_multiple(step - 1, self.eval_every), self.last_step)

    def is_report_step(self, step: int) -> bool:
        return step % self.settings.log_every_steps == 0 or self.is_eval_step(step) or step == self.last_step

    def next_stop(self, step: int, max_steps: int) -> int:
        """The step after which the host is wanted next, at most `max_steps` on."""
        everies = (self.settings.log_every_steps, self.settings.checkpoint_every_steps, self.eval_every)
        return min(step + max_steps, self.last_step, *(next_multiple(step, every) for every in everies if every),
                   *(first for first in self.resizes if first > step))


def make_plan(settings: Train, num_examples: int, has_evaluation: bool) -> Plan:
    """The plan of a run over `num_examples`. Raises ConfigError if there is not one step to make."""
    steps_per_epoch = num_examples / settings.global_batch_size
    num_steps = int(settings.epochs * num_examples / settings.global_batch_size + 1e-9)
    if not num_steps:
        raise ConfigError(f'train.epochs is {settings.epochs}: with {num_examples} examples that is less than one '
                          f'batch of train.global_batch_size = {settings.global_batch_size}')
    return Plan(settings, steps_per_epoch, num_steps, min(num_steps, settings.max_steps or num_steps),
                settings.eval_every_epochs * steps_per_epoch if has_evaluation else None,
                frozenset(round(epoch * steps_per_epoch) for epoch, _ in settings.image_sizes or ()))


def next_multiple(step: int, every: float) -> int:
    """The first step after `step` at which another whole number of `every` steps is done; `every` need not be whole."""
    count = int(step / every + 1e-9) + 1
    return max(step + 1, -int(-(count * every - 1e-6) // 1))
