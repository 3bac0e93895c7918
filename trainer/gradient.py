"""One of the two pure functions of a step: forward_backward, from parameters and rows to gradients.

It knows the network and no replica: what has to be averaged over replicas inside of it comes as a function.
"""
import os
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from ghostnet.keyed import step_context
from trainer.loss import smoothed_cross_entropy
from trainer.metrics import SUMS, masked_sums
from trainer.mix import erase, mix_pairs
from trainer.recipe import Train
from trainer.state import Tensors
from trainer.strategy import has_accelerator


def make_forward_backward(model: keras.Model, settings: Train, normalize: Callable[[tf.Tensor], tf.Tensor],
                          num_replicas: int) -> Callable[..., tuple[Tensors, Tensors, Tensors]]:
    """Makes forward_backward(params, batch_stats, loss_scale, batch, keys, step_keys, cross_replica_mean=None) ->
    (grads, batch_stats, sums) of these rows: uint8 images -> mix -> normalize -> erase -> model, a pure function.

    Summed over `num_replicas` replicas the gradients are those of the global mean. Batch statistics are the sum of what
    each of settings.accumulate parts has; cross_replica_mean synchronises them, see `step_context`; parts take none.
    """
    def forward_backward(params: Tensors, batch_stats: Tensors, loss_scale: Tensors, batch: Tensors, keys: tf.Tensor,
                         step_keys: tf.Tensor, cross_replica_mean: Callable[[tf.Tensor], tf.Tensor] | None = None):
        images, alphas = batch['image'], (settings.mixup_alpha, settings.cutmix_alpha)
        if any(alphas):
            images, other_labels, share = mix_pairs(batch, step_keys[:1], *alphas)
        images = normalize(images)
        if settings.erase_probability:
            images = erase(images, keys, step_keys[1:], settings.erase_probability)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(params)
            with step_context(keys, cross_replica_mean, num_replicas):
                logits, stats = model.stateless_call([*params.values()], [*batch_stats.values()], images, training=True)
            losses = smoothed_cross_entropy(logits, batch['label'], settings.label_smoothing)
            if any(alphas):  # of both labels; top-1 and top-5 are those of the own
                losses += share * (smoothed_cross_entropy(logits, other_labels, settings.label_smoothing) - losses)
            # Divided by the global batch here and summed over replicas later: the gradient of the global mean.
            loss = tf.reduce_sum(batch['mask'] * losses) / settings.global_batch_size * loss_scale.get('loss_scale', 1)
        sums = masked_sums(logits, losses, batch['label'], batch['mask'])
        return tape.gradient(loss, params), dict(zip(batch_stats, stats, strict=True)), sums

    # Parts need nothing of each other but the sum. One after the other they save memory; on the CPU, where most
    # operations are too small to be shared by threads, a part to each core is the fastest way through a batch.
    parallel_parts = 1 if has_accelerator() else max(1, len(os.sched_getaffinity(0)) // num_replicas)

    def forward_backward_in_parts(params: Tensors, batch_stats: Tensors, loss_scale: Tensors, batch: Tensors,
                                  keys: tf.Tensor, step_keys: tf.Tensor):
        """The sums of forward_backward over settings.accumulate equal parts of the rows, as if each were a replica."""
        parts = tf.nest.map_structure(lambda t: tf.reshape(t, [settings.accumulate, -1, *t.shape[1:]]), (batch, keys))

        def add_part(i: tf.Tensor, totals: Any):
            rows = tf.nest.map_structure(lambda t: t[i], parts)
            added = forward_backward(params, batch_stats, loss_scale, *rows, step_keys)
            return i + 1, tf.nest.map_structure(tf.add, totals, added)

        zeros = tf.nest.map_structure(tf.zeros_like, (params, batch_stats, dict.fromkeys(SUMS, tf.constant(0.0))))
        return tf.while_loop(lambda i, _: i < settings.accumulate, add_part, (tf.constant(0), zeros),
                             parallel_iterations=parallel_parts)[1]

    return forward_backward if settings.accumulate == 1 else forward_backward_in_parts
