"""The training and the evaluation step, and the loops of them that run on the device.

The only file that knows of replicas: strategy.run, all_reduce and jit_compile stand here and nowhere else. A training
step is two pure functions, forward_backward and update, with one packed all-reduce between them.
"""
import os
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from ghostnet.keyed import row_keys, step_context
from trainer.ema import ema_update
from trainer.loss import smoothed_cross_entropy
from trainer.loss_scale import next_loss_scale
from trainer.metrics import SUMS, masked_sums
from trainer.optimizer import clip_adaptively, clip_by_global_norm
from trainer.recipe import ConfigError
from trainer.state import TrainState
from trainer.strategy import has_accelerator, is_multi_worker

Tensors = dict[str, tf.Tensor]


def distribute(strategy: tf.distribute.Strategy, make_dataset: Callable[..., tf.data.Dataset]) -> Any:
    """An iterable of global batches, each replica's rows on its device.

    Args:
        strategy: the strategy.
        make_dataset: called with shard= and num_shards=, returns this input process' batches of that shard.
    """
    def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
        num_local = context.num_replicas_in_sync // context.num_input_pipelines
        dataset = make_dataset(shard=context.input_pipeline_id, num_shards=context.num_input_pipelines)
        if num_local > 1:  # consecutive elements go to consecutive replicas
            dataset = dataset.map(lambda batch: {key: tf.reshape(value, [num_local, value.shape[0] // num_local,
                                                                         *value.shape[1:]])
                                                 for key, value in batch.items()}).unbatch()
        return dataset.prefetch(2 * num_local)

    return strategy.distribute_datasets_from_function(dataset_fn)


def value_of_first_worker(strategy: tf.distribute.Strategy, value: int) -> int:
    """What the first worker calls this with, on every worker; all of them have to call it at the same point."""
    if not is_multi_worker(strategy):
        return value

    def replica_value(value):
        replica = tf.distribute.get_replica_context()
        own = tf.where(replica.replica_id_in_sync_group == 0, value, 0)
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, own)

    values = tf.function(lambda value: strategy.run(replica_value, args=(value,)))(tf.constant(value, tf.int64))
    return int(strategy.experimental_local_results(values)[0])


def use_jit(jit: bool | str, strategy: tf.distribute.Strategy, sync_batch_norm: bool) -> bool:
    """train.jit: 'auto' compiles on GPU and TPU; XLA's depthwise convolution on the CPU is 8 times slower.

    Raises:
        ConfigError: True with statistics that are synchronised over replicas, which is a collective in every layer.
    """
    can_compile = not sync_batch_norm or strategy.num_replicas_in_sync == 1
    if jit is True and not can_compile:
        raise ConfigError('train.jit is True and so is train.sync_batch_norm: XLA cannot compile collectives of '
                          f"{strategy.num_replicas_in_sync} replicas; take train.jit = 'auto' or False")
    return has_accelerator() and can_compile if jit == 'auto' else jit


def _all_reduce_sum(replica: tf.distribute.ReplicaContext, tree: Any) -> Any:
    """Sums float32 tensors of any structure over the replicas in one collective."""
    tensors = tf.nest.flatten(tree)
    packed = tf.concat([tf.reshape(t, [-1]) for t in tensors], axis=0)
    packed = replica.all_reduce(tf.distribute.ReduceOp.SUM, packed)
    parts = tf.split(packed, [t.shape.num_elements() for t in tensors])
    return tf.nest.pack_sequence_as(tree, [tf.reshape(part, t.shape) for part, t in zip(parts, tensors, strict=True)])


def _assign(variables: dict[str, tf.Variable], tensors: Tensors) -> None:
    for path, variable in variables.items():
        variable.assign(tensors[path])


def make_normalize(pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]) -> Callable[[tf.Tensor], tf.Tensor]:
    """uint8 [B, H, W, 3] -> float32, (value / 255 - mean) / std for each of R, G, B."""
    scale = [1 / (255 * std) for std in pixel_std]
    offset = [-mean / std for mean, std in zip(pixel_mean, pixel_std, strict=True)]
    return lambda images: tf.cast(images, tf.float32) * scale + offset


def make_train_loop(strategy: tf.distribute.Strategy, model: keras.Model, state: TrainState, *,
                    normalize: Callable[[tf.Tensor], tf.Tensor], update_fn: Callable,
                    schedule: Callable[[tf.Tensor], tf.Tensor], global_batch_size: int, seed: int,
                    accumulate: int, label_smoothing: float, clip_norm: float | None, adaptive_clip: float | None,
                    ema_decay: float | None, sync_batch_norm: bool,
                    jit: bool) -> Callable[[Iterator, tf.Tensor], Tensors]:
    """Makes train_loop(iterator, num_steps) -> float32 scalars summed over the steps.

    The sums: 'examples', 'loss', 'top1', 'top5' over examples of steps that were taken, 'seen' over those of all steps;
    'grad_norm' and 'skipped' over steps; 'data_wait_secs'.

    Args:
        strategy, model, state: model is used as a pure function of the variables in state.
        normalize: uint8 images -> the floats that the model takes.
        update_fn: the optimizer's update, see optimizer.py.
        schedule: step -> learning rate.
        global_batch_size: rows over all replicas.
        seed: of what is drawn on the device.
        accumulate, label_smoothing, clip_norm, adaptive_clip, ema_decay, sync_batch_norm: as in recipe.Train.
        jit: compile with XLA: the whole step on one replica, else forward_backward and update, each by itself.
    """
    num_replicas = strategy.num_replicas_in_sync
    rows = global_batch_size // num_replicas

    def forward_backward(params: Tensors, batch_stats: Tensors, loss_scale: Tensors, batch: Tensors, keys: tf.Tensor):
        cross_replica_mean = None
        if sync_batch_norm and num_replicas > 1:
            replica = tf.distribute.get_replica_context()
            def cross_replica_mean(t):
                return replica.all_reduce(tf.distribute.ReduceOp.MEAN, t)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(params)
            with step_context(keys, cross_replica_mean, num_replicas):
                logits, new_stats = model.stateless_call(list(params.values()), list(batch_stats.values()),
                                                         normalize(batch['image']), training=True)
            losses = smoothed_cross_entropy(logits, batch['label'], label_smoothing)
            # Divided by the global batch here and summed over replicas below: the gradient of the global mean.
            loss = tf.reduce_sum(batch['mask'] * losses) / global_batch_size
            loss *= loss_scale.get('loss_scale', 1.0)
        grads = tape.gradient(loss, params)
        return grads, dict(zip(batch_stats, new_stats, strict=True)), masked_sums(logits, losses, batch['label'],
                                                                                  batch['mask'])

    def forward_backward_in_parts(params: Tensors, batch_stats: Tensors, loss_scale: Tensors, batch: Tensors,
                                  keys: tf.Tensor):
        """The sums of forward_backward over `accumulate` equal parts of the rows, as if each were a replica's."""
        parts = tf.nest.map_structure(lambda t: tf.reshape(t, [accumulate, -1, *t.shape[1:]]), (batch, keys))

        def add_part(i, totals):
            part = tf.nest.map_structure(lambda t: t[i], parts)
            return i + 1, tf.nest.map_structure(tf.add, totals, forward_backward(params, batch_stats, loss_scale,
                                                                              *part))

        zeros = tf.nest.map_structure(tf.zeros_like, (params, batch_stats, dict.fromkeys(SUMS, tf.constant(0.0))))
        # Parts need nothing of each other but the sum. One after the other they save memory; on the CPU, where most
        # operations are too small to be shared by threads, a part to each core is the fastest way through a batch.
        parallel = 1 if has_accelerator() else max(1, len(os.sched_getaffinity(0)) // num_replicas)
        return tf.while_loop(lambda i, _: i < accumulate, add_part, (tf.constant(0), zeros),
                             parallel_iterations=parallel)[1]

    def update(params: Tensors, batch_stats: Tensors, slots: Any, ema: Tensors, loss_scale: Tensors, grads: Tensors,
               new_stats: Tensors, step: tf.Tensor):
        if loss_scale:
            grads = {path: g / loss_scale['loss_scale'] for path, g in grads.items()}
        norm = tf.linalg.global_norm(list(grads.values()))
        is_finite = tf.math.is_finite(norm) & tf.reduce_all([tf.reduce_all(tf.math.is_finite(s))
                                                             for s in new_stats.values()])

        def take():
            clipped = grads if clip_norm is None else clip_by_global_norm(grads, norm, clip_norm)
            clipped = clipped if adaptive_clip is None else clip_adaptively(clipped, params, adaptive_clip)
            new_params, new_slots = update_fn(clipped, slots, params, schedule(step), step)
            new_ema = ema_update(ema, new_params | new_stats, ema_decay, step) if ema else {}
            return new_params, new_stats, new_slots, new_ema

        # All replicas see the same sums, so that all take the step or none does. No collective stands in the branches.
        kept = tf.cond(is_finite, take, lambda: (params, batch_stats, slots, ema))
        return *kept, next_loss_scale(loss_scale, is_finite), is_finite, norm

    compute = forward_backward if accumulate == 1 else forward_backward_in_parts
    if jit and num_replicas > 1:
        compute = tf.function(compute, jit_compile=True, autograph=False)
        update = tf.function(update, jit_compile=True, autograph=False)

    def replica_step(batch: Tensors) -> Tensors:
        replica = tf.distribute.get_replica_context()
        params, batch_stats, slots, ema, loss_scale = tf.nest.map_structure(
            tf.convert_to_tensor, (state.params, state.batch_stats, state.slots, state.ema, state.loss_scale))
        step = tf.convert_to_tensor(state.step)
        keys = row_keys(seed, step, replica.replica_id_in_sync_group * rows, rows)
        grads, new_stats, sums = compute(params, batch_stats, loss_scale, batch, keys)
        if num_replicas > 1:
            grads, new_stats, sums = _all_reduce_sum(replica, (grads, new_stats, sums))
        if num_replicas * accumulate > 1:  # one view of them for all replicas and parts
            new_stats = {path: s / (num_replicas * accumulate) for path, s in new_stats.items()}
        params, batch_stats, slots, ema, loss_scale, is_finite, norm = update(params, batch_stats, slots, ema,
                                                                              loss_scale, grads, new_stats, step)
        _assign(state.params, params)
        _assign(state.batch_stats, batch_stats)
        for slot, tensors in slots.items():
            _assign(state.slots[slot], tensors)
        _assign(state.ema, ema)
        _assign(state.loss_scale, loss_scale)
        taken = {name: tf.where(is_finite, value, 0.0) for name, value in (sums | {'grad_norm': norm}).items()}
        return taken | {'seen': sums['examples'], 'skipped': 1 - tf.cast(is_finite, tf.float32)}

    if jit and num_replicas == 1:
        replica_step = tf.function(replica_step, jit_compile=True, autograph=False)

    names = (*SUMS, 'seen', 'grad_norm', 'skipped')

    @tf.function
    def train_loop(iterator, num_steps):
        totals, waited = tf.zeros([len(names)]), tf.zeros([], tf.float64)
        for _ in tf.range(num_steps):
            with tf.control_dependencies([totals]):  # the step before has ended: from here on it is waiting for data
                start = tf.timestamp()
            with tf.control_dependencies([start]):
                batch = next(iterator)
            with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
                waited += tf.timestamp() - start
            sums = strategy.run(replica_step, args=(batch,))
            sums = {name: strategy.experimental_local_results(value)[0] for name, value in sums.items()}
            totals += tf.stack([sums[name] for name in names])
            state.step.assign_add(1)
            state.position.assign_add(global_batch_size)
        return dict(zip(names, tf.unstack(totals), strict=True)) | {'data_wait_secs': waited}

    return train_loop


def make_eval_loop(strategy: tf.distribute.Strategy, model: keras.Model, params: dict[str, tf.Variable],
                   batch_stats: dict[str, tf.Variable], *, normalize: Callable[[tf.Tensor], tf.Tensor],
                   jit: bool) -> Callable[[Iterator, tf.Tensor], Tensors]:
    """Makes eval_loop(iterator, num_batches) -> sums over the unmasked rows: 'examples', 'loss', 'top1', 'top5'."""

    def forward(params: Tensors, batch_stats: Tensors, batch: Tensors) -> Tensors:
        logits, _ = model.stateless_call(list(params.values()), list(batch_stats.values()),
                                         normalize(batch['image']), training=False)
        losses = smoothed_cross_entropy(logits, batch['label'])
        return masked_sums(logits, losses, batch['label'], batch['mask'])

    if jit:
        forward = tf.function(forward, jit_compile=True, autograph=False)

    def replica_step(batch: Tensors) -> Tensors:
        return forward(*tf.nest.map_structure(tf.convert_to_tensor, (params, batch_stats)), batch)

    @tf.function
    def eval_loop(iterator, num_batches):
        totals = tf.zeros([len(SUMS)], tf.float64)
        for _ in tf.range(num_batches):
            sums = strategy.run(replica_step, args=(next(iterator),))
            totals += tf.cast(tf.stack([strategy.reduce('SUM', sums[name], axis=None) for name in SUMS]), tf.float64)
        return dict(zip(SUMS, tf.unstack(totals), strict=True))

    return eval_loop
