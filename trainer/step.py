"""The training and the evaluation step and their loops: only here stand strategy.run, all_reduce and jit_compile.

A training step is two pure functions, forward_backward and update, with one packed all-reduce between them.
"""
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ghostnet.keyed import row_keys, step_context
from trainer.gradient import make_forward_backward
from trainer.loss import smoothed_cross_entropy
from trainer.metrics import SUMS, masked_sums
from trainer.recipe import Train, require
from trainer.schedule import Rate
from trainer.state import Tensors, TrainState, Values, Variables
from trainer.strategy import find_worker, has_accelerator, is_multi_worker
from trainer.update import make_update


def distribute(strategy: tf.distribute.Strategy, make_dataset: Callable[..., tf.data.Dataset]) -> Any:
    """Global batches, each replica's rows on its device; make_dataset(shard=, num_shards=) gives a process its own."""
    def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
        num_local = context.num_replicas_in_sync // context.num_input_pipelines
        dataset = make_dataset(shard=context.input_pipeline_id, num_shards=context.num_input_pipelines)
        if num_local > 1:  # consecutive elements go to consecutive replicas; nothing remains, so shapes stay static
            dataset = dataset.rebatch(dataset.element_spec['mask'].shape[0] // num_local, drop_remainder=True)
        return dataset.prefetch(2 * num_local)

    worker, num_workers = find_worker(strategy)
    if strategy.num_replicas_in_sync == num_workers and not has_accelerator():
        return make_dataset(shard=worker, num_shards=num_workers)  # the other's iterator may take a minute to end
    return strategy.distribute_datasets_from_function(dataset_fn)


def make_sum_over_workers(strategy: tf.distribute.Strategy) -> Callable[[int], int]:
    """Makes sum_over_workers(value) -> the sum of what all workers call it with, each at the same point of the run."""
    if not is_multi_worker(strategy):
        return int
    num_local = strategy.num_replicas_in_sync // find_worker(strategy)[1]  # replicas that have a worker's value each
    total = tf.function(lambda value: strategy.reduce('SUM', strategy.run(tf.identity, args=(value,)), axis=None))
    return lambda value: int(total(tf.constant(value, tf.int64))) // num_local


def _share(strategy: tf.distribute.Strategy, settings: Train, function: Callable) -> Callable:
    """A function of tensors, traced once for all replicas of this process, and compiled for each device if train.jit.

    tf.function alone makes a trace for each device too, eight for eight GPUs: here merge_call leaves the device before.
    'auto' compiles on GPU and TPU; XLA's depthwise convolution on the CPU is 8 times slower.
    """
    can_compile = not settings.sync_batch_norm or strategy.num_replicas_in_sync == 1
    require(settings.jit is not True or can_compile, 'train.jit', True, "'auto' or False, as XLA cannot compile the "
            f'collectives of {strategy.num_replicas_in_sync} replicas that train.sync_batch_norm = True takes')
    jit = has_accelerator() and can_compile if settings.jit == 'auto' else settings.jit
    if isinstance(strategy, tf.distribute.TPUStrategy) or (
            strategy.num_replicas_in_sync == find_worker(strategy)[1] and not jit):
        return function  # a TPU's replicas have one trace anyway, all of which is compiled
    # Not inlined: the passes that TensorFlow makes over a graph would see a copy for each replica.
    traced = tf.function(lambda *args: function(*args), jit_compile=jit or None, autograph=False,
                         experimental_attributes={'_noinline': True})

    def call(*args: Any) -> Any:
        specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), args)
        return tf.distribute.get_replica_context().merge_call(lambda _: traced.get_concrete_function(*specs))(*args)

    return call


def _all_reduce_packed(all_reduce: Callable[[tf.Tensor], tf.Tensor], tree: Any, dtype: str = 'float32') -> Any:
    """Sums the float32 tensors of any structure over the replicas, in one collective that moves them as `dtype`."""
    # In rows of 128 numbers: tf.split need not copy what begins at a multiple of 64 bytes, and a TPU pads no row. The
    # many small tensors that fill no row are laid together first, as each operation on each of them takes its time.
    tensors = tf.nest.flatten(tree)
    whole = [t for t in tensors if t.shape.num_elements() % 128 == 0]
    ragged = [t if t.shape.rank == 1 else tf.reshape(t, [-1]) for t in tensors if t.shape.num_elements() % 128]
    ragged.append(tf.zeros([-sum(t.shape[0] for t in ragged) % 128]))
    rows = [tf.reshape(tf.cast(t, dtype), [-1, 128]) for t in (*whole, tf.concat(ragged, axis=0))]
    *whole, rest = tf.split(tf.cast(all_reduce(tf.concat(rows, axis=0)), tf.float32), [r.shape[0] for r in rows])
    whole, ragged = iter(whole), iter(tf.split(tf.reshape(rest, [-1]), [t.shape[0] for t in ragged]))
    sums = [(next(ragged if t.shape.num_elements() % 128 else whole), t.shape) for t in tensors]
    return tf.nest.pack_sequence_as(tree, [s if s.shape == shape else tf.reshape(s, shape) for s, shape in sums])


def make_normalize(pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]) -> Callable[[tf.Tensor], tf.Tensor]:
    """Pixels in 0..255, [B, H, W, 3] -> float32, (value / 255 - mean) / std for each of R, G, B."""
    scale = [1 / (255 * std) for std in pixel_std]
    offset = [-mean / std for mean, std in zip(pixel_mean, pixel_std, strict=True)]
    return lambda images: tf.cast(images, tf.float32) * scale + offset


def make_step(model: keras.Model, settings: Train, *, normalize: Callable, update_fn: Callable, schedule: Rate,
              num_replicas: int, all_reduce: Callable[[tf.Tensor], tf.Tensor],
              share: Callable = lambda function: function) -> Callable[..., tuple[Values, Tensors]]:
    """Makes step(values, batch, step_number, replica_id) -> (values, sums): what one replica computes.

    A pure function: forward_backward, a packed all-reduce, update. `all_reduce` sums a float tensor over the replicas;
    `share` wraps what knows of no other replica: of one all of the step, of many forward_backward and update.
    """
    rows, dtype = settings.global_batch_size // num_replicas, settings.all_reduce_dtype
    num_parts = num_replicas * settings.accumulate
    forward_backward = make_forward_backward(model, settings, normalize, num_replicas)
    update = make_update(update_fn, schedule, settings)
    if settings.sync_batch_norm:  # on one replica too: any number computes the same
        forward_backward = functools.partial(
            forward_backward, cross_replica_mean=lambda t: all_reduce(t) / num_replicas if num_replicas > 1 else t)
    elif num_replicas > 1:
        forward_backward = share(forward_backward)
    update = share(update) if num_replicas > 1 else update

    def step(values: Values, batch: Tensors, step_number: tf.Tensor, replica_id: tf.Tensor):
        keys = row_keys(settings.seed, step_number, replica_id * rows, rows)
        step_keys = row_keys(settings.seed, step_number, -2, 2)  # of no row, and the same on all replicas
        grads, new_stats, sums = forward_backward(
            values.params, values.batch_stats, values.loss_scale, batch, keys, step_keys)
        if num_replicas > 1:
            if dtype != 'float32':  # of gradients alone: the rest keeps its digits, and goes amid the backward pass
                new_stats, sums = _all_reduce_packed(all_reduce, (new_stats, sums))
                grads = _all_reduce_packed(all_reduce, grads, dtype)
            else:
                grads, new_stats, sums = _all_reduce_packed(all_reduce, (grads, new_stats, sums))
        if num_parts > 1:  # one view of them for all replicas and parts
            new_stats = {path: s / num_parts for path, s in new_stats.items()}
        new_values, is_taken, norm = update(values, grads, new_stats, sums['loss'], step_number)
        taken = {name: tf.where(is_taken, value, 0.0) for name, value in (sums | {'grad_norm': norm}).items()}
        return new_values, taken | {'seen': sums['examples'], 'skipped': 1 - tf.cast(is_taken, tf.float32)}

    return step if num_replicas > 1 else share(step)


def make_train_loop(strategy: tf.distribute.Strategy, model: keras.Model, state: TrainState, settings: Train,
                    **step_arguments: Any) -> Callable[[Iterator, tf.Tensor], Tensors]:
    """Makes train_loop(iterator, num_steps) -> float64 scalars summed over the steps, wherever loops begin.

    They are metrics.SUMS over examples of steps that were taken, 'seen' over those of all steps; 'grad_norm', 'skipped'
    over steps; 'data_wait_secs'. step_arguments: make_step's others. ConfigError: XLA cannot compile these settings.
    """
    step = make_step(model, settings, num_replicas=strategy.num_replicas_in_sync,
                     all_reduce=lambda t: tf.distribute.get_replica_context().all_reduce('SUM', t),
                     share=functools.partial(_share, strategy, settings), **step_arguments)

    @tf.autograph.experimental.do_not_convert  # AutoGraph takes a third of the time to trace, for nothing
    def replica_step(batch: Tensors) -> Tensors:
        replica_id = tf.convert_to_tensor(tf.distribute.get_replica_context().replica_id_in_sync_group)
        values, sums = step(state.read(), batch, tf.convert_to_tensor(state.step), replica_id)
        state.assign(values)
        return sums

    def stay(tensor: tf.Tensor) -> tf.Tensor:
        with tf.device(tensor.device):
            return tf.identity(tensor)

    names = (*SUMS, 'seen', 'grad_norm', 'skipped')

    @tf.function
    def train_loop(iterator, num_steps):
        totals, waited = tf.zeros([len(names)], tf.float64), tf.zeros([], tf.float64)
        for _ in tf.range(num_steps):
            with tf.control_dependencies([totals]):  # the step before has ended: from here on it is waiting for data
                start = tf.timestamp()
            with tf.control_dependencies([start]):
                batch = next(iterator)
            with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
                end = tf.timestamp()
            with tf.control_dependencies([end]):  # or a lone core would read the clock after the step
                batch = tf.nest.map_structure(stay, batch, expand_composites=True)
            waited += end - start
            sums = strategy.run(replica_step, args=(batch,))
            totals += tf.cast(tf.stack([strategy.experimental_local_results(sums[n])[0] for n in names]), tf.float64)
            state.step.assign_add(1)
            state.position.assign_add(settings.global_batch_size)
        return dict(zip(names, tf.unstack(totals), strict=True)) | {'data_wait_secs': waited}

    return train_loop


def _make_total(strategy: tf.distribute.Strategy, settings: Train, forward: Callable, params: Variables,
                batch_stats: Variables, shape: list[int], reduction: str) -> Callable[..., np.ndarray]:
    """Makes total(iterator, loop_sizes): forward(params, batch_stats, batch) over replicas and batches, as float64."""
    forward = _share(strategy, settings, forward)

    @tf.autograph.experimental.do_not_convert
    def replica_step(batch: Tensors) -> tf.Tensor:
        values = [[tf.convert_to_tensor(v) for v in variables.values()] for variables in (params, batch_stats)]
        return forward(*values, batch)

    @tf.function
    def loop(iterator: Iterator, num_batches: tf.Tensor, totals: tf.Tensor) -> tf.Tensor:
        for _ in tf.range(num_batches):
            of_batch = strategy.reduce(reduction, strategy.run(replica_step, args=(next(iterator),)), axis=None)
            totals += tf.cast(of_batch, tf.float64)  # batch by batch: the same bits in loops of any sizes
        return totals

    def total(iterator: Iterator, loop_sizes: Iterable[int]) -> np.ndarray:
        totals = np.zeros(shape)
        for size in loop_sizes:
            totals = loop(iterator, tf.constant(size), tf.constant(totals)).numpy()  # here the host waits
        return totals

    return total


def make_estimate_loop(strategy: tf.distribute.Strategy, model: keras.Model, settings: Train, normalize: Callable,
                       params: Variables, batch_stats: Variables) -> Callable[[Iterator, int, Iterable[int]], None]:
    """Makes estimate_loop(iterator, num_batches, loop_sizes), which assigns statistics of these batches to batch_stats.

    The variance is that of all rows: the mean of the batches' variances and the variance of their means. Source: Wu and
    Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
    """
    sizes = [v.shape.num_elements() for v in batch_stats.values()]

    def forward(params: list[tf.Tensor], batch_stats: list[tf.Tensor], batch: Tensors) -> tf.Tensor:
        with step_context(momentum=0.0):
            _, stats = model.stateless_call(params, batch_stats, normalize(batch['image']), training=True)
        packed = tf.concat([tf.reshape(s, [-1]) for s in stats], axis=0)
        return tf.stack([packed, tf.square(packed)])

    total = _make_total(strategy, settings, forward, params, batch_stats, [2, sum(sizes)], 'MEAN')

    def estimate_loop(iterator: Iterator, num_batches: int, loop_sizes: Iterable[int]) -> None:
        means, squares = total(iterator, loop_sizes) / num_batches
        # By path: the mean over the batches, and, of which only those of the batches' means are used, the variance.
        means, spreads = (dict(zip(batch_stats, np.split(np.float32(values), np.cumsum(sizes[:-1])), strict=True))
                          for values in (means, squares - np.square(means)))
        for path, variable in batch_stats.items():
            is_mean = path.endswith('moving_mean')
            variable.assign(means[path] + (0.0 if is_mean else spreads[path.replace('moving_variance', 'moving_mean')]))

    return estimate_loop


def make_eval_loop(strategy: tf.distribute.Strategy, model: keras.Model, settings: Train, normalize: Callable,
                   params: Variables, batch_stats: Variables) -> Callable[[Iterator, Iterable[int]], dict[str, float]]:
    """Makes eval_loop(iterator, loop_sizes) -> metrics.SUMS of the unmasked rows, and 'rows', all but the padding."""
    def forward(params: list[tf.Tensor], batch_stats: list[tf.Tensor], batch: Tensors) -> tf.Tensor:
        images = normalize(batch['image'])
        views = [images, tf.reverse(images, [2])] if settings.eval_flip else [images]
        logits = sum(model.stateless_call(params, batch_stats, view, training=False)[0] for view in views) / len(views)
        sums = masked_sums(logits, smoothed_cross_entropy(logits, batch['label']), batch['label'], batch['mask'])
        sums['rows'] = tf.reduce_sum(tf.cast(batch['index'] >= 0, tf.float32))
        return tf.stack([sums[name] for name in names])

    names = (*SUMS, 'rows')
    total = _make_total(strategy, settings, forward, params, batch_stats, [len(names)], 'SUM')
    return lambda iterator, loop_sizes: dict(zip(names, total(iterator, loop_sizes).tolist(), strict=True))
