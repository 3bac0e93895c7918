"""TrainState: every variable of a run under a stable name. Checkpoints, evaluation and export are functions of it."""
from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer.guard import init_guard
from trainer.loss_scale import init_loss_scale
from trainer.recipe import ConfigError, Train
from trainer.strategy import has_accelerator

Variables = dict[str, tf.Variable]
Tensors = dict[str, tf.Tensor]

# What a step computes anew: the values of TrainState's fields after step and position.
Values = namedtuple('Values', 'params batch_stats slots ema loss_scale guard')


class TrainState(NamedTuple):
    """The one mutable thing."""

    step: tf.Variable  # int64 scalar, updates made
    position: tf.Variable  # int64 scalar, the next example's place in the stream of epochs
    params: Variables  # {path: float32 variable}, the model's own, as are batch_stats
    batch_stats: Variables
    slots: dict[str, Variables]  # {slot name: {path: variable}}
    ema: Variables  # over params and batch_stats; empty if none is kept
    loss_scale: Variables  # see loss_scale.py; empty unless precision is mixed_float16
    guard: Variables  # see guard.py; empty unless the recipe asks for it

    def variables(self) -> Variables:
        """All of it, by the names it has in a checkpoint."""
        named = {'step': self.step, 'position': self.position, **self.loss_scale}
        slots = {f'slots/{slot}': variables for slot, variables in self.slots.items()}
        kinds = {'params': self.params, 'batch_stats': self.batch_stats, **slots, 'ema': self.ema, 'guard': self.guard}
        return named | {f'{kind}/{path}': v for kind, variables in kinds.items() for path, v in variables.items()}

    def weights(self, name: str) -> tuple[Variables, Variables]:
        """(params, batch_stats) to evaluate: 'raw', or 'ema'."""
        if name == 'raw':
            return self.params, self.batch_stats
        return {path: self.ema[path] for path in self.params}, {path: self.ema[path] for path in self.batch_stats}

    def read(self) -> Values:
        """The values at this time, on this replica."""
        return tf.nest.map_structure(tf.convert_to_tensor, Values(*self[2:]))

    def assign(self, values: Values) -> None:
        """Assigns all of them, on this replica."""
        tf.nest.map_structure(lambda v, value: v.assign(value, read_value=False), Values(*self[2:]), values)

    def restore(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Assigns every variable that `tensors` has a value of; names and shapes must have been checked."""
        for name, variable in self.variables().items():
            variable.assign(tensors.get(name, variable))


def build_train_state(model: keras.Model, init_slots: Callable, settings: Train) -> TrainState:
    """Builds the state around the variables of `model`. To be called in the strategy's scope."""
    def by_path(variables):  # without the model's own name, which Keras numbers by the order of construction
        return {v.path.removeprefix(f'{model.name}/'): v.value for v in variables}

    params, batch_stats = by_path(model.trainable_variables), by_path(model.non_trainable_variables)
    if (policy := model.dtype_policy.name) != keras.config.dtype_policy().name:
        raise ValueError(f'{model.name} was built as {policy}, but train.precision is {settings.precision!r}')
    others = [path for path, v in (params | batch_stats).items() if v.dtype != tf.float32]
    if others or len(params) + len(batch_stats) != len(model.variables):
        raise ValueError(f'variables of {model.name} must have unique paths and be float32, as {others} are not; for '
                         'dropout without a variable of its own take ghostnet.keyed.KeyedDropout')

    def scalar(name):
        return tf.Variable(0, False, dtype=tf.int64, name=name, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)

    def build_variables(tensors):
        return {path: tf.Variable(tf.convert_to_tensor(t), trainable=False, name=path.replace('/', '_'))
                for path, t in tensors.items()}

    initial = {path: tf.convert_to_tensor(v) for path, v in params.items()}
    slots = {slot: build_variables(tensors) for slot, tensors in init_slots(initial).items()}
    ema = build_variables({} if settings.ema_decay is None else params | batch_stats)
    loss_scale = build_variables(init_loss_scale(settings.precision))
    guard = build_variables(init_guard(settings.spike_factor, settings.rollback_after))
    return TrainState(scalar('step'), scalar('position'), params, batch_stats, slots, ema, loss_scale, guard)


def num_logits(model: keras.Model) -> int:
    """How many classes the model tells apart; a subclassed model has no output_shape of its own."""
    images = keras.KerasTensor((None, None, None, 3))
    return (getattr(model, 'output_shape', None) or model.compute_output_spec(images).shape)[-1]


def build_model_and_state(settings: Train, strategy: tf.distribute.Strategy,
                          num_classes: int) -> tuple[keras.Model, TrainState, Callable]:
    """Builds the model, its state and the optimizer's update on the devices of `strategy`; num_classes: of the data.

    Raises ConfigError: a batch that the replicas do not divide, or more classes in the data than in the model.
    """
    replicas, parts, rows = strategy.num_replicas_in_sync, settings.accumulate, settings.global_batch_size
    if rows % (unit := replicas * parts * (2 if settings.mixup_alpha or settings.cutmix_alpha else 1)):
        times = f' times train.accumulate = {parts}' * (parts > 1) + ' times 2, for pairs' * (unit > replicas * parts)
        raise ConfigError(f'train.global_batch_size is {rows}; it must be a multiple of the {replicas} replicas{times},'
                          f' as {max(1, rows // unit) * unit}')
    init_slots, update = settings.optimizer()
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(settings.precision.replace('tf32', 'float32'))
    tf.config.experimental.enable_tensor_float_32_execution(settings.precision == 'tf32')  # TensorFlow's default: yes
    # Or Grappler joins sums of a large network into temporary variables, and leaves those behind in loops over parts.
    # On a CPU all of it takes a quarter of the time to trace and compile a step, which is no faster for it.
    tf.config.optimizer.set_experimental_options({
        'arithmetic_optimization': False, 'disable_meta_optimizer': not has_accelerator()})
    try:
        keras.utils.set_random_seed(settings.seed)
        with strategy.scope():
            model = settings.model()
            state = build_train_state(model, init_slots, settings)
    except ValueError as error:  # of a value that the network refuses
        raise ConfigError(str(error).splitlines()[0]) from error
    finally:
        keras.config.set_dtype_policy(policy)
    if num_classes > num_logits(model):
        raise ConfigError(f'the data has {num_classes} classes, the model {num_logits(model)}: bind num_classes of '
                          f'the model, as ghostnet.num_classes = {num_classes}')
    return model, state, update
