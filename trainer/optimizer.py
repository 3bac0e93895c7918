"""Optimizers as pairs of pure functions (init, update). They own no variable and know of no replica.

    init(params) -> slots
    update(grads, slots, params, learning_rate, step) -> (params, slots)

params and grads: {path: float32 tensor}; slots: {slot name: {path: float32 tensor}}. A value out of range or of another
type raises ConfigError.
"""
import math
from collections.abc import Callable

import tensorflow as tf

from trainer.recipe import is_number, require

Tensors = dict[str, tf.Tensor]
Slots = dict[str, Tensors]


def is_decayed(path: str) -> bool:
    """Weight decay is for kernels; biases, gamma and beta of batch norm are left alone."""
    return path.rsplit('/', 1)[-1] == 'kernel'


def sgd(*, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0) -> tuple[Callable, Callable]:
    """Stochastic gradient descent with momentum, as torch.optim.SGD computes it (dampening 0).

    g = grad + weight_decay * p for kernels (L2 added to the gradient), v = momentum * v + g,
    p -= learning_rate * (g + momentum * v if nesterov else v).
    """
    require(is_number(momentum, 0, 1), 'sgd.momentum', momentum, 'a number, at least 0 and below 1')
    require(is_number(weight_decay, 0), 'sgd.weight_decay', weight_decay, 'a number, at least 0')
    require(isinstance(nesterov, bool), 'sgd.nesterov', nesterov, 'True or False')

    def init(params: Tensors) -> Slots:
        return {'momentum': _zeros(params)}

    def update(grads: Tensors, slots: Slots, params: Tensors, learning_rate: tf.Tensor,
               step: tf.Tensor) -> tuple[Tensors, Slots]:
        del step  # the update is the same at every step
        new_params, velocities = {}, {}
        for path, p in params.items():
            g = grads[path] + weight_decay * p if weight_decay and is_decayed(path) else grads[path]
            v = momentum * slots['momentum'][path] + g
            new_params[path] = p - learning_rate * (g + momentum * v if nesterov else v)
            velocities[path] = v
        return new_params, {'momentum': velocities}

    return init, update


def rmsprop(*, decay: float = 0.9, momentum: float = 0.9, epsilon: float = 1e-10,
            weight_decay: float = 0.0) -> tuple[Callable, Callable]:
    """RMSprop as TensorFlow 1 computes it, under which the MobileNet and EfficientNet recipes were found.

    g = grad + weight_decay * p for kernels (L2 added to the gradient), s = decay * s + (1 - decay) * g**2 from s = 1,
    v = momentum * v + learning_rate * g / sqrt(s + epsilon), p -= v.
    It differs from PyTorch's and Keras' by s = 1 at the start, by epsilon inside the root (PyTorch), and by the rate
    inside v (PyTorch): what v holds goes on at the rate under which it came in.

    Source: Tieleman and Hinton, "Neural Networks for Machine Learning", lecture 6.5, 2012; the kernel ApplyRMSProp of
    TensorFlow with the initial value of tf.compat.v1.train.RMSPropOptimizer; timm's RMSpropTF agrees.
    """
    for name, value in (('decay', decay), ('momentum', momentum)):
        require(is_number(value, 0, 1), f'rmsprop.{name}', value, 'a number, at least 0 and below 1')
    _require_epsilon_and_weight_decay('rmsprop', epsilon, weight_decay)

    def init(params: Tensors) -> Slots:
        return {'mean_square': {path: tf.ones_like(p) for path, p in params.items()}, 'momentum': _zeros(params)}

    def update(grads: Tensors, slots: Slots, params: Tensors, learning_rate: tf.Tensor,
               step: tf.Tensor) -> tuple[Tensors, Slots]:
        del step  # the update is the same at every step
        new_params, mean_squares, velocities = {}, {}, {}
        for path, p in params.items():
            g = grads[path] + weight_decay * p if weight_decay and is_decayed(path) else grads[path]
            s = slots['mean_square'][path]
            s += (1 - decay) * (g * g - s)
            v = momentum * slots['momentum'][path] + learning_rate * g / tf.sqrt(s + epsilon)
            new_params[path], mean_squares[path], velocities[path] = p - v, s, v
        return new_params, {'mean_square': mean_squares, 'momentum': velocities}

    return init, update


def adamw(*, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-8,
          weight_decay: float = 0.01) -> tuple[Callable, Callable]:
    """Adam with decoupled weight decay, as torch.optim.AdamW computes it.

    m = beta_1 * m + (1 - beta_1) * g, v = beta_2 * v + (1 - beta_2) * g**2, with t = step + 1
    r = m / (1 - beta_1**t) / (sqrt(v / (1 - beta_2**t)) + epsilon),
    p -= learning_rate * (r + weight_decay * p for kernels, r for all else).
    A step that is skipped counts in t too: the correction matters in the first steps of a run only.

    Source: Kingma and Ba, "Adam", ICLR 2015, algorithm 1; Loshchilov and Hutter, "Decoupled weight decay
    regularization", ICLR 2019, algorithm 2, where the schedule alone scales the decay; here, as in PyTorch, the rate
    does.
    """
    adam = _make_adam('adamw', beta_1, beta_2, epsilon, weight_decay)

    def update(grads: Tensors, slots: Slots, params: Tensors, learning_rate: tf.Tensor,
               step: tf.Tensor) -> tuple[Tensors, Slots]:
        directions, slots = adam(grads, slots, step)
        new_params = {}
        for path, p in params.items():
            r = directions[path] + weight_decay * p if is_decayed(path) else directions[path]
            new_params[path] = p - learning_rate * r
        return new_params, slots

    return _adam_init, update


def lamb(*, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-6,
         weight_decay: float = 0.01) -> tuple[Callable, Callable]:
    """Adam whose step has, in each kernel, a length in proportion to the kernel's own: for large batches.

    r as in `adamw`. For kernels u = r + weight_decay * p and p -= learning_rate * (|p| / |u|) * u, where the ratio is 1
    if either norm is 0 (phi is the identity: the ratio is not clipped); for all else p -= learning_rate * r.
    That only kernels get the ratio is timm's and NVIDIA's choice; the paper gives it to every layer. Their clipping of
    the gradient's global norm to 1 is train.clip_norm = 1.0 here.

    Source: You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", ICLR 2020,
    algorithm 2; timm's Lamb.
    """
    adam = _make_adam('lamb', beta_1, beta_2, epsilon, weight_decay)

    def update(grads: Tensors, slots: Slots, params: Tensors, learning_rate: tf.Tensor,
               step: tf.Tensor) -> tuple[Tensors, Slots]:
        directions, slots = adam(grads, slots, step)
        new_params = {}
        for path, p in params.items():
            u, ratio = directions[path], 1.0
            if is_decayed(path):
                u += weight_decay * p
                p_norm, u_norm = tf.norm(p), tf.norm(u)
                ratio = tf.where((p_norm > 0) & (u_norm > 0), p_norm / u_norm, 1.0)
            new_params[path] = p - learning_rate * ratio * u
        return new_params, slots

    return _adam_init, update


def _adam_init(params: Tensors) -> Slots:
    return {'first_moment': _zeros(params), 'second_moment': _zeros(params)}


def _make_adam(name: str, beta_1: float, beta_2: float, epsilon: float, weight_decay: float) -> Callable:
    """Checks what adamw and lamb share; makes (grads, slots, step) -> (directions r, slots)."""
    for parameter, value in (('beta_1', beta_1), ('beta_2', beta_2)):
        require(is_number(value, 0, 1) and value > 0, f'{name}.{parameter}', value, 'a number, above 0 and below 1')
    _require_epsilon_and_weight_decay(name, epsilon, weight_decay)

    def adam(grads: Tensors, slots: Slots, step: tf.Tensor) -> tuple[Tensors, Slots]:
        t = tf.cast(step, tf.float32) + 1
        # 1 - beta**t, but by expm1: float32 would lose four of its digits in the difference.
        correction_1, correction_2 = (-tf.math.expm1(t * math.log(beta)) for beta in (beta_1, beta_2))
        directions, firsts, seconds = {}, {}, {}
        for path, g in grads.items():
            m, v = slots['first_moment'][path], slots['second_moment'][path]
            m += (1 - beta_1) * (g - m)
            v += (1 - beta_2) * (g * g - v)
            directions[path] = m / correction_1 / (tf.sqrt(v / correction_2) + epsilon)
            firsts[path], seconds[path] = m, v
        return directions, {'first_moment': firsts, 'second_moment': seconds}

    return adam


def _zeros(params: Tensors) -> Tensors:
    return {path: tf.zeros_like(p) for path, p in params.items()}


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

    Source: Brock et al., "High-performance large-scale image recognition without normalization", ICML 2021,
    section 4, for units and classifier too; timm's clip mode `agc` agrees.
    clip_factor is the paper's lambda: 0.01 for a batch of 4096 and more for smaller ones.
    """
    classifier = list(params)[-1].rsplit('/', 1)[0]
    clipped = {}
    for path, g in grads.items():
        largest = clip_factor * tf.maximum(_unit_norms(params[path]), 1e-3)
        scale = tf.minimum(1.0, largest / tf.maximum(_unit_norms(g), 1e-6))
        clipped[path] = g if path.rsplit('/', 1)[0] == classifier else g * scale
    return clipped


def _unit_norms(t: tf.Tensor) -> tf.Tensor:
    rank = t.shape.rank
    is_depthwise = rank == 4 and t.shape[-1] == 1
    unit_axis = None if rank <= 1 else rank - 2 if is_depthwise else rank - 1
    other_axes = [axis for axis in range(rank) if axis != unit_axis]
    return tf.sqrt(tf.reduce_sum(t * t, axis=other_axes, keepdims=True))
