"""TrainState: every variable of a run under a stable name. Checkpoints, evaluation and export are functions of it."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer.loss_scale import init_loss_scale
from trainer.recipe import ConfigError, Train

Variables = dict[str, tf.Variable]
Tensors = dict[str, tf.Tensor]


class Values(NamedTuple):
    """What a step computes anew: the values of these fields of TrainState."""

    params: Tensors
    batch_stats: Tensors
    slots: dict[str, Tensors]
    ema: Tensors
    loss_scale: Tensors


@dataclass(frozen=True)
class TrainState:
    """The one mutable thing.

    step: int64 scalar, updates made. position: int64 scalar, the next example's place in the stream of epochs.
    params, batch_stats: {path: float32 variable}, the model's own. slots: {slot name: {path: variable}}.
    ema: {path: variable} over params and batch_stats; empty if none is kept.
    loss_scale: see loss_scale.py; empty unless precision is mixed_float16.
    """

    step: tf.Variable
    position: tf.Variable
    params: Variables
    batch_stats: Variables
    slots: dict[str, Variables]
    ema: Variables
    loss_scale: Variables

    def variables(self) -> Variables:
        """All of it, by the names it has in a checkpoint."""
        named = {'step': self.step, 'position': self.position, **self.loss_scale}
        named.update({f'params/{path}': v for path, v in self.params.items()})
        named.update({f'batch_stats/{path}': v for path, v in self.batch_stats.items()})
        for slot, variables in self.slots.items():
            named.update({f'slots/{slot}/{path}': v for path, v in variables.items()})
        named.update({f'ema/{path}': v for path, v in self.ema.items()})
        return named

    def weights(self, name: str) -> tuple[Variables, Variables]:
        """(params, batch_stats) to evaluate: 'raw', or 'ema'."""
        if name == 'raw':
            return self.params, self.batch_stats
        return {path: self.ema[path] for path in self.params}, {path: self.ema[path] for path in self.batch_stats}

    def read(self) -> Values:
        """The values at this time, on this replica."""
        return tf.nest.map_structure(tf.convert_to_tensor, self._trained())

    def assign(self, values: Values) -> None:
        """Assigns all of them, on this replica."""
        tf.nest.map_structure(lambda variable, value: variable.assign(value), self._trained(), values)

    def _trained(self) -> Values:
        return Values(self.params, self.batch_stats, self.slots, self.ema, self.loss_scale)

    def restore(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Assigns every variable; names and shapes must have been checked."""
        for name, variable in self.variables().items():
            variable.assign(tensors[name])


def variable_path(model: keras.Model, variable: keras.Variable) -> str:
    """The path without the model's own name, which Keras numbers by the order of construction in a process."""
    return variable.path.removeprefix(f'{model.name}/')


def build_train_state(model: keras.Model, init_slots: Callable, *, with_ema: bool = False,
                      precision: str = 'float32') -> TrainState:
    """Builds the state around the variables of `model`. To be called inside the strategy's scope."""
    params = {variable_path(model, v): v.value for v in model.trainable_variables}
    batch_stats = {variable_path(model, v): v.value for v in model.non_trainable_variables}
    if len(params) + len(batch_stats) != len(model.variables):
        raise ValueError(f'the variables of {model.name} do not have unique paths')

    def scalar(name):
        return tf.Variable(0, dtype=tf.int64, trainable=False, name=name,
                           aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)

    def build_variables(tensors):
        return {path: tf.Variable(t, trainable=False, name=path.replace('/', '_')) for path, t in tensors.items()}

    initial = {path: tf.convert_to_tensor(v) for path, v in params.items()}
    slots = {slot: build_variables(tensors) for slot, tensors in init_slots(initial).items()}
    averaged = params | batch_stats if with_ema else {}
    ema = build_variables({path: tf.convert_to_tensor(v) for path, v in averaged.items()})
    loss_scale = build_variables(init_loss_scale(precision))
    return TrainState(scalar('step'), scalar('position'), params, batch_stats, slots, ema, loss_scale)


def num_logits(model: keras.Model) -> int:
    """How many classes the model tells apart; a subclassed model has no output_shape of its own."""
    shape = getattr(model, 'output_shape', None) or model.compute_output_spec(
        keras.KerasTensor((None, None, None, 3))).shape
    return shape[-1]


def build_model_and_state(settings: Train, strategy: tf.distribute.Strategy,
                          num_classes: int) -> tuple[keras.Model, TrainState, Callable]:
    """Builds the model, its state and the optimizer's update on the devices of `strategy`.

    Args:
        settings: model, optimizer, precision, seed and EMA.
        strategy: where the variables live.
        num_classes: of the data.

    Raises:
        ConfigError: a batch that the replicas do not divide, or more classes in the data than in the model.
    """
    replicas, parts, rows = strategy.num_replicas_in_sync, settings.accumulate, settings.global_batch_size
    if rows % (replicas * parts):
        times = f' times train.accumulate = {parts}' if parts > 1 else ''
        raise ConfigError(f'train.global_batch_size is {rows}; it must be a multiple of the {replicas} replicas{times},'
                          f' as {max(1, rows // (replicas * parts)) * replicas * parts}')
    init_slots, update = settings.optimizer()
    policy = keras.config.dtype_policy()
    keras.utils.set_random_seed(settings.seed)
    keras.config.set_dtype_policy(settings.precision.replace('tf32', 'float32'))
    tf.config.experimental.enable_tensor_float_32_execution(settings.precision == 'tf32')  # TensorFlow's default: yes
    try:
        with strategy.scope():
            model = settings.model()
            state = build_train_state(model, init_slots, with_ema=settings.ema_decay is not None,
                                      precision=settings.precision)
    except ValueError as error:  # of a value that the network refuses
        raise ConfigError(str(error).splitlines()[0]) from error
    finally:
        keras.config.set_dtype_policy(policy)
    model_classes = num_logits(model)
    if num_classes > model_classes:
        raise ConfigError(f'the data has {num_classes} classes, the model {model_classes}: bind num_classes of '
                          f'the model, as ghostnet.num_classes = {num_classes}')
    return model, state, update
