"""Optimizers as pairs of pure functions (init, update). They own no variable and know of no replica.

    init(params) -> slots;  update(grads, slots, params, learning_rate, step) -> (params, slots)

params, grads: {path: float32 tensor}; slots: {slot name: {path: float32 tensor}}. Wrong values raise ConfigError.
"""
import math
from collections.abc import Callable

import tensorflow as tf

from trainer.recipe import is_number, require

Tensors = dict[str, tf.Tensor]
Optimizer = tuple[Callable, Callable]  # (init, update)


def sgd(*, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0) -> Optimizer:
    """SGD with momentum as torch.optim.SGD has it (dampening 0); weight decay is L2, added to kernels' gradients."""
    require(is_number(momentum, 0, 1), 'sgd.momentum', momentum, 'a number, at least 0 and below 1')
    require(is_number(weight_decay, 0), 'sgd.weight_decay', weight_decay, 'a number, at least 0')
    require(isinstance(nesterov, bool), 'sgd.nesterov', nesterov, 'True or False')

    def rule(p, g, decayed, learning_rate, step, v):
        g = g + weight_decay * p if weight_decay and decayed else g
        v = momentum * v + g
        return p - learning_rate * (g + momentum * v if nesterov else v), v

    return _for_each_parameter(rule, {'momentum': tf.zeros_like})


def rmsprop(*, decay: float = 0.9, momentum: float = 0.9, epsilon: float = 1e-10,
            weight_decay: float = 0.0) -> Optimizer:
    """RMSprop as TensorFlow 1 computes it, under which the MobileNet and EfficientNet recipes were found.

    Weight decay is L2, added to kernels' gradients. The mean square starts at 1 and epsilon is inside the root, which
    PyTorch has otherwise. Source: TensorFlow's ApplyRMSProp and tf.compat.v1.train.RMSPropOptimizer; timm's RMSpropTF.
    """
    for name, value in (('decay', decay), ('momentum', momentum)):
        require(is_number(value, 0, 1), f'rmsprop.{name}', value, 'a number, at least 0 and below 1')
    _require_epsilon_and_weight_decay('rmsprop', epsilon, weight_decay)

    def rule(p, g, decayed, learning_rate, step, s, v):
        g = g + weight_decay * p if weight_decay and decayed else g
        s += (1 - decay) * (g * g - s)
        v = momentum * v + learning_rate * g / tf.sqrt(s + epsilon)
        return p - v, s, v

    return _for_each_parameter(rule, {'mean_square': tf.ones_like, 'momentum': tf.zeros_like})


def adamw(*, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-8,
          weight_decay: float = 0.01) -> Optimizer:
    """Adam with weight decay of kernels, decoupled but scaled by the rate, as torch.optim.AdamW computes it.

    The bias correction counts skipped steps too: it matters in the first steps of a run only.
    Source: Kingma and Ba, "Adam", ICLR 2015; Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """
    return _adam('adamw', beta_1, beta_2, epsilon, weight_decay, kernel_ratio=lambda p, u: 1.0)


def lamb(*, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-6, weight_decay: float = 0.01) -> Optimizer:
    """Adam whose step has, in each kernel, a length in proportion to the kernel's own: for large batches.

    The step u of a kernel p, decay included, is scaled by |p| / |u|, not clipped, or by 1 if either is 0; of no
    other, as by timm and NVIDIA; the paper's is of every layer. Their clipping is train.clip_norm = 1.0 here.
    Source: You et al., "Large batch optimization for deep learning", ICLR 2020, algorithm 2; timm's Lamb.
    """
    def norm_ratio(p, u):
        p_norm, u_norm = tf.norm(p), tf.norm(u)
        return tf.where((p_norm > 0) & (u_norm > 0), p_norm / u_norm, 1.0)

    return _adam('lamb', beta_1, beta_2, epsilon, weight_decay, norm_ratio)


def _adam(name: str, beta_1: float, beta_2: float, epsilon: float, weight_decay: float,
          kernel_ratio: Callable) -> Optimizer:
    """What adamw and lamb share; kernel_ratio(p, u) is what the rate of a kernel's step u is multiplied by."""
    for parameter, value in (('beta_1', beta_1), ('beta_2', beta_2)):
        require(is_number(value, 0, 1) and value > 0, f'{name}.{parameter}', value, 'a number, above 0 and below 1')
    _require_epsilon_and_weight_decay(name, epsilon, weight_decay)

    def rule(p, g, decayed, learning_rate, step, m, v):
        m += (1 - beta_1) * (g - m)
        v += (1 - beta_2) * (g * g - v)
        t = tf.cast(step, tf.float32) + 1
        # 1 - beta**t, but by expm1: float32 would lose four of its digits in the difference.
        bias_1, bias_2 = (-tf.math.expm1(t * math.log(beta)) for beta in (beta_1, beta_2))
        u = m / bias_1 / (tf.sqrt(v / bias_2) + epsilon)
        if decayed:
            u += weight_decay * p
            learning_rate = learning_rate * kernel_ratio(p, u)
        return p - learning_rate * u, m, v

    return _for_each_parameter(rule, {'first_moment': tf.zeros_like, 'second_moment': tf.zeros_like})


def _for_each_parameter(rule: Callable, slots_like: dict[str, Callable]) -> Optimizer:
    """(init, update) from the rule of one parameter p and its gradient g.

    rule(p, g, is_decayed, learning_rate, step, *slots) -> (p, *slots); slots_like: {slot name: p -> initial value}.
    Decay is for kernels; biases, gamma and beta of batch norm are left alone.
    """
    def init(params):
        return {slot: {path: like(p) for path, p in params.items()} for slot, like in slots_like.items()}

    def update(grads, slots, params, learning_rate, step):
        stepped = [rule(p, grads[path], path.split('/')[-1] == 'kernel', learning_rate, step,
                        *(slots[s][path] for s in slots_like)) for path, p in params.items()]
        new_params, *new_slots = (dict(zip(params, tensors)) for tensors in zip(*stepped))
        return new_params, dict(zip(slots_like, new_slots))

    return init, update


def _require_epsilon_and_weight_decay(name: str, epsilon: float, weight_decay: float) -> None:
    require(is_number(epsilon) and epsilon > 0, f'{name}.epsilon', epsilon, 'a positive number')
    require(is_number(weight_decay, 0), f'{name}.weight_decay', weight_decay, 'a number, at least 0')


def clip_by_global_norm(grads: Tensors, norm: tf.Tensor, clip_norm: float) -> Tensors:
    """Scales all gradients by min(1, clip_norm / norm), norm being that of all of them together."""
    scale = tf.minimum(1.0, clip_norm / tf.maximum(norm, 1e-12))
    return {path: g * scale for path, g in grads.items()}


def clip_adaptively(grads: Tensors, params: Tensors, clip_factor: float) -> Tensors:
    """Scales the gradient of each unit to a norm of at most clip_factor * max(norm of its parameters, 1e-3).

    A unit is what computes one output channel: one of the last axis of a kernel, in a depthwise kernel [k, k, C, 1] one
    of C, and a bias, gamma or beta as a whole. The last layer of params, the classifier, is not clipped.
    Source: Brock et al., "High-performance large-scale image recognition without normalization", ICML 2021, section 4,
    for units and classifier too; clip_factor is its lambda: 0.01 for 4096 images, more for fewer. timm's `agc` agrees.
    """
    classifier = list(params)[-1].rsplit('/', 1)[0]
    clipped = {}
    for path, g in grads.items():
        largest = clip_factor * tf.maximum(_unit_norms(params[path]), 1e-3)
        scale = tf.minimum(1.0, largest / tf.maximum(_unit_norms(g), 1e-6))
        clipped[path] = g if path.rsplit('/', 1)[0] == classifier else g * scale
    return clipped


def _unit_norms(t: tf.Tensor) -> tf.Tensor:
    axes = list(range(t.shape.rank))
    if len(axes) > 1:
        axes.pop(-2 if len(axes) == 4 and t.shape[-1] == 1 else -1)  # that of the units
    return tf.sqrt(tf.reduce_sum(t * t, axis=axes, keepdims=True))
