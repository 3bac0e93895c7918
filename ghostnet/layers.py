"""Layers of the GhostNet family: convolutions padded as PyTorch pads, fused batch norm, ghost modules and bottlenecks.

A step hands to its layers what it has by `keyed.step_context`: a model is a pure function of (variables, images).
Source: Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, and the authors' PyTorch code.
"""
import functools
import math

import keras
import numpy as np
import tensorflow as tf

from ghostnet.keyed import StepContext, current_step


@keras.saving.register_keras_serializable('ghostnet')
class BatchNorm(keras.layers.Layer):
    """Batch normalisation over [B, H, W, C] through the device's fused kernel, with PyTorch's constants.

    epsilon 1e-5; moving = 0.9 * moving + 0.1 * batch, its variance unbiased; variables, statistics float32. Keras' own
    runs unfused (1.6 times slower a step), keeps the biased variance, and cannot synchronise in a compiled step.
    """

    def __init__(self, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs):
        super().__init__(**kwargs)
        self.momentum, self.epsilon = momentum, epsilon

    def build(self, input_shape):
        weight = functools.partial(self.add_weight, shape=(input_shape[-1],), dtype='float32', autocast=False)
        self.gamma = weight(name='gamma', initializer='ones')
        self.beta = weight(name='beta', initializer='zeros')
        self.moving_mean = weight(name='moving_mean', initializer='zeros', trainable=False)
        self.moving_variance = weight(name='moving_variance', initializer='ones', trainable=False)

    def call(self, x, training=False):
        fused = functools.partial(tf.raw_ops.FusedBatchNormV3, x=x, scale=self.gamma, offset=self.beta,
                                  epsilon=self.epsilon, is_training=bool(training))
        if not training:
            return fused(mean=self.moving_mean, variance=self.moving_variance).y
        step = current_step()
        y, mean, variance = self._synchronised(x, step) if step.cross_replica_mean else fused(mean=[], variance=[])[:3]
        momentum = self.momentum if step.momentum is None else step.momentum
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(momentum * tf.convert_to_tensor(moving) + (1 - momentum) * batch)
        return y

    def _synchronised(self, x, step: StepContext):
        """Statistics of the global batch, unbiased by its count.

        Two reductions of [C], the second about the mean of the first: mean of squares minus square of the mean would
        lose digits. Each axis is summed by itself: one float32 sum over all rows is off by 1e-4 at 65,536 rows.
        """
        def mean_of(t):
            for axis in (2, 1, 0):
                t = tf.reduce_mean(t, axis)
            return step.cross_replica_mean(t)

        x32 = tf.cast(x, tf.float32)
        mean = mean_of(x32)
        variance = mean_of(tf.math.squared_difference(x32, mean))
        y = tf.nn.batch_normalization(x32, mean, variance, self.beta, self.gamma, self.epsilon)
        count = tf.cast(tf.reduce_prod(tf.shape(x)[:3]) * step.num_replicas, tf.float32)
        return tf.cast(y, x.dtype), mean, variance * count / tf.maximum(count - 1, 1)


def fan_in_uniform(fan_in: int) -> keras.initializers.Initializer:
    """Uniform in +-1 / sqrt(fan_in), the default of PyTorch that the reference implementation trains from.

    Under batch norm the smaller a kernel is the further a step of SGD turns it: He's normal distribution, of six times
    the variance, has a sixth of the effective rate. Keras' VarianceScaling counts a depthwise fan over all channels.
    """
    return keras.initializers.RandomUniform(-fan_in**-0.5, fan_in**-0.5)


def _symmetric_padding(kernel_size: int, strides: int) -> str | list[list[int]]:
    """k // 2 on every side, as PyTorch; 'SAME' would pad a stride of two on the right and at the bottom only.

    At stride 1 the two are the same, and 'SAME' is up to five times as fast in a depthwise gradient on the CPU.
    """
    return 'SAME' if strides == 1 else [[0, 0], [kernel_size // 2] * 2, [kernel_size // 2] * 2, [0, 0]]


@keras.saving.register_keras_serializable('ghostnet')
class Conv(keras.layers.Layer):
    """[B, H, W, in] -> [B, ceil(H / strides), ceil(W / strides), filters], odd kernel, symmetric padding."""

    def __init__(self, filters: int, kernel_size: int = 1, strides: int = 1, use_bias: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.filters, self.kernel_size, self.strides, self.use_bias = filters, kernel_size, strides, use_bias

    def build(self, input_shape):
        shape = (self.kernel_size, self.kernel_size, input_shape[-1], self.filters)
        self.kernel = self.add_weight(shape, initializer=fan_in_uniform(math.prod(shape[:3])), name='kernel')
        self.bias = self.add_weight(name='bias', shape=(self.filters,), initializer='zeros') if self.use_bias else None

    def call(self, x):
        if self.kernel_size == self.strides == 1:
            # The same sums as a matrix product: a step with the CPU's 1x1 convolution gradients takes 1.7 times longer.
            rows, kernel = tf.reshape(x, [-1, x.shape[-1]]), tf.reshape(self.kernel, self.kernel.shape[2:])
            x = tf.reshape(rows @ kernel, [*keras.ops.shape(x)[:-1], self.filters])
        else:
            x = tf.nn.conv2d(x, self.kernel, self.strides, _symmetric_padding(self.kernel_size, self.strides))
        return x if self.bias is None else tf.nn.bias_add(x, self.bias)


@tf.custom_gradient
def _depthwise_on_small_map(x: tf.Tensor, kernel: tf.Tensor):
    """Depthwise convolution of stride 1 on maps smaller than the kernel, with another gradient of the kernel.

    The CPU's own takes four times as long on [64, 2, 2, 480], where images of less than 64 pixels end. Each place of x
    is multiplied with each of upstream, summed over images; a tap's gradient is the sum over its pairs.
    """
    def grad(upstream):
        height, width, size = x.shape[1], x.shape[2], kernel.shape[0]
        places = np.indices((height, width)).reshape(2, -1)
        offsets = places[:, :, None] - places[:, None] + size // 2
        of_rows, of_columns = (np.equal.outer(np.arange(size), offset) for offset in offsets)
        joins = np.float32(of_rows[:, None] & of_columns)  # [size, size, places, places]: 1 for the pairs of a tap
        a, b = (tf.reshape(tf.cast(t, tf.float32), [-1, height * width, t.shape[-1]]) for t in (x, upstream))
        pairs = tf.reduce_sum(a[:, :, None] * b[:, None], axis=0)
        of_kernel = tf.tensordot(joins, pairs, 2)[..., None]
        of_x = tf.nn.depthwise_conv2d_backprop_input(tf.shape(x), kernel, upstream, [1, 1, 1, 1], 'SAME')
        return of_x, tf.cast(of_kernel, kernel.dtype)

    return tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], 'SAME'), grad


@keras.saving.register_keras_serializable('ghostnet')
class DepthwiseConv(keras.layers.Layer):
    """[B, H, W, C] -> [B, ceil(H / strides), ceil(W / strides), C], odd kernel, symmetric padding, no bias."""

    def __init__(self, kernel_size: int = 3, strides: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.kernel_size, self.strides = kernel_size, strides

    def build(self, input_shape):
        shape = (self.kernel_size, self.kernel_size, input_shape[-1], 1)
        self.kernel = self.add_weight(shape, initializer=fan_in_uniform(self.kernel_size**2), name='kernel')

    def call(self, x):
        height, width = x.shape[1:3]
        if self.strides == 1 and height and width and max(height, width) < self.kernel_size:
            return _depthwise_on_small_map(x, tf.convert_to_tensor(self.kernel))
        return tf.nn.depthwise_conv2d(x, self.kernel, [1, self.strides, self.strides, 1],
                                      _symmetric_padding(self.kernel_size, self.strides))


class Composite(keras.layers.Layer):
    """A layer made of layers, which its first call builds, or `build`, by tracing one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.built = True  # or Keras would have each call's trace made twice, once to build

    def build(self, input_shape):
        self.compute_output_spec(keras.KerasTensor(input_shape, self.compute_dtype))


def run_chain(layers: list[keras.layers.Layer], x: tf.Tensor, **kwargs) -> tf.Tensor:
    """Runs x through one layer after the other."""
    for layer in layers:
        x = layer(x, **kwargs)
    return x


@keras.saving.register_keras_serializable('ghostnet')
class ConvBN(Composite):
    """Convolution (depthwise where `filters` is None), batch norm, and ReLU if `relu`."""

    def __init__(self, filters: int | None, kernel_size: int = 1, strides: int = 1, relu: bool = True, **kwargs):
        super().__init__(**kwargs)
        self.relu = relu
        self.conv = (DepthwiseConv(kernel_size, strides, name='conv') if filters is None else
                     Conv(filters, kernel_size, strides, name='conv'))
        self.bn = BatchNorm(name='bn')

    def call(self, x):
        x = self.bn(self.conv(x))
        return tf.nn.relu(x) if self.relu else x


@keras.saving.register_keras_serializable('ghostnet')
class GhostModule(Composite):
    """[B, H, W, in] -> [B, H, W, filters]: half ordinary 1x1 convolution, half cheap depthwise 3x3 of that half.

    Paper section 3.1 at ratio 2: ceil(filters / 2) primary maps, of which the cheap ones are made after norm and ReLU.
    """

    def __init__(self, filters: int, relu: bool = True, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.primary = ConvBN(-(-filters // 2), relu=relu, name='primary')
        self.cheap = ConvBN(None, kernel_size=3, relu=relu, name='cheap')

    def call(self, x):
        primary = self.primary(x)
        maps = tf.concat([primary, self.cheap(primary)], axis=-1)
        # The slice is an identity for even `filters`, but its gradient is a copy.
        return maps if self.filters % 2 == 0 else maps[..., :self.filters]


@keras.saving.register_keras_serializable('ghostnet')
class SqueezeExcite(Composite):
    """Scales each channel by hard_sigmoid(expand(relu(reduce(mean over H, W)))), hard_sigmoid(x) = relu6(x + 3) / 6."""

    def __init__(self, filters: int, hidden: int, **kwargs):
        super().__init__(**kwargs)
        self.reduce = Conv(hidden, use_bias=True, name='reduce')
        self.expand = Conv(filters, use_bias=True, name='expand')

    def call(self, x):
        gate = self.expand(tf.nn.relu(self.reduce(tf.reduce_mean(x, axis=[1, 2], keepdims=True))))
        return x * (tf.nn.relu6(gate + 3) / 6)


@keras.saving.register_keras_serializable('ghostnet')
class GhostBottleneck(Composite):
    """[B, H, W, in_filters] -> [B, ceil(H / strides), ceil(W / strides), filters].

    Paper section 3.2: ghost module to `expansion` maps, at stride 2 a depthwise convolution without ReLU, squeeze and
    excite to `se_hidden` maps (None: none), ghost module without ReLU to `filters` maps, plus the shortcut; nothing
    after the sum. The shortcut is the identity where shapes allow, else depthwise and 1x1. `kernel_size`: of these.
    """

    def __init__(self, in_filters: int, expansion: int, filters: int, kernel_size: int = 3, strides: int = 1,
                 se_hidden: int | None = None, **kwargs):
        super().__init__(**kwargs)
        main = [GhostModule(expansion, name='ghost1')]
        if strides > 1:
            main.append(ConvBN(None, kernel_size, strides, relu=False, name='depthwise'))
        if se_hidden:
            main.append(SqueezeExcite(expansion, se_hidden, name='se'))
        self.main = main + [GhostModule(filters, relu=False, name='ghost2')]
        self.shortcut = [] if in_filters == filters and strides == 1 else [
            ConvBN(None, kernel_size, strides, relu=False, name='shortcut_depthwise'),
            ConvBN(filters, relu=False, name='shortcut_pointwise')]

    def call(self, x):
        return run_chain(self.main, x) + run_chain(self.shortcut, x)
