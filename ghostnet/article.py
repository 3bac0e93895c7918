"""The variant of GhostNet that the well-known TensorFlow 2 tutorial builds, as a class and as functions.

Nothing in it is improved, so that its differences from the authors' network (model.py) can be measured: no batch norm
nor ReLU inside a ghost module, a convolutional shortcut in every block, ReLU after the stride-2 depthwise convolution,
squeeze-and-excite by half and without biases, batch norm in the head, no dropout, 'same' padding, Glorot
initialisation, softmax inside, one width. But batch norm is layers.py's, fused, its moving variance unbiased.
"""
import functools

import keras

from ghostnet import layers
from ghostnet.model import BLOCKS, HEAD_FILTERS, Chain, connect

_conv = functools.partial(keras.layers.Conv2D, kernel_size=1, padding='same', use_bias=False)
_depthwise = functools.partial(keras.layers.DepthwiseConv2D, padding='same', use_bias=False)


def _with_bn(layer: keras.layers.Layer, relu: bool = True) -> list[keras.layers.Layer]:
    chain = [layer, layers.BatchNorm(momentum=0.99, epsilon=1e-3, name=f'{layer.name}_bn')]
    return chain + [keras.layers.ReLU(name=f'{layer.name}_relu')] if relu else chain


@keras.saving.register_keras_serializable('ghostnet_article')
class GhostModule(layers.Composite):
    """[B, H, W, in] -> [B, H, W, filters (even)], linear: a 1x1 convolution beside a depthwise 3x3 of its output."""

    def __init__(self, filters: int, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.primary = _conv(filters // 2, name='primary')
        self.cheap = _depthwise(3, name='cheap')

    call = layers.GhostModule.call  # the layers inside are what differs; so it is below


@keras.saving.register_keras_serializable('ghostnet_article')
class SqueezeExcite(layers.Composite):
    """Scales each of `filters` channels by hard_sigmoid(expand(relu(reduce(mean over H, W)))), reduced to a half."""

    def __init__(self, filters: int, **kwargs):
        super().__init__(**kwargs)
        self.reduce = _conv(filters // 2, name='reduce')
        self.expand = _conv(filters, name='expand')

    call = layers.SqueezeExcite.call


@keras.saving.register_keras_serializable('ghostnet_article')
class GhostBottleneck(layers.Composite):
    """[B, H, W, in] -> [B, ceil(H / strides), ceil(W / strides), filters]; the shortcut is never the identity."""

    def __init__(self, expansion: int, filters: int, kernel_size: int = 3, strides: int = 1, apply_se: bool = False,
                 **kwargs):
        super().__init__(**kwargs)
        main = _with_bn(GhostModule(expansion, name='ghost1'))
        if strides > 1:
            main += _with_bn(_depthwise(kernel_size, strides, name='depthwise'))
        if apply_se:
            main.append(SqueezeExcite(expansion, name='se'))
        self.main = main + _with_bn(GhostModule(filters, name='ghost2'), relu=False)
        self.shortcut = [*_with_bn(_depthwise(kernel_size, strides, name='shortcut_depthwise'), relu=False),
                         *_with_bn(_conv(filters, name='shortcut_pointwise'), relu=False)]

    call = layers.GhostBottleneck.call


def _build_layers(classes: int, apply_se: bool, classifier_activation: str | None) -> list[keras.layers.Layer]:
    """The network as a chain; class and function form run the same one."""
    if not (isinstance(classes, int) and classes > 0):
        raise ValueError(f'article.classes is {classes!r}; it must be a positive integer')
    if classifier_activation not in ('softmax', None):
        raise ValueError(f"article.classifier_activation is {classifier_activation!r}; it must be 'softmax' or None")
    return [
        *_with_bn(_conv(16, kernel_size=3, strides=2, name='stem')),
        *(GhostBottleneck(expansion, filters, kernel_size, strides, bool(apply_se and se_ratio), name=f'block_{number}')
          for number, (kernel_size, expansion, filters, se_ratio, strides) in enumerate(BLOCKS, start=1)),
        *_with_bn(_conv(BLOCKS[-1][1], name='tail')),
        keras.layers.GlobalAveragePooling2D(keepdims=True, name='pool'),
        *_with_bn(_conv(HEAD_FILTERS, name='head')),
        _conv(classes, name='classifier', dtype='float32'),  # outputs are float32 whatever the compute dtype
        keras.layers.Flatten(name='flatten', dtype='float32'),
        keras.layers.Activation(classifier_activation, name='activation', dtype='float32'),
    ]


@keras.saving.register_keras_serializable('ghostnet_article')
class GhostNet(Chain):
    """The network as a class, built on construction. Arguments and variables of `ghostnet`; any image size."""

    def __init__(self, classes: int, apply_se: bool = True, classifier_activation: str | None = 'softmax', **kwargs):
        config = {'classes': classes, 'apply_se': apply_se, 'classifier_activation': classifier_activation}
        super().__init__(_build_layers, config, **kwargs)


def ghostnet(classes: int, apply_se: bool = True, classifier_activation: str | None = 'softmax', *,
             image_size: int | tuple[int, int] | None = 224) -> keras.Model:
    """The tutorial's network as a functional Keras model, [B, H, W, 3] normalised images -> float32 [B, classes].

    6,836,664 trainable parameters with 1000 classes, 3,840,312 without squeeze-and-excite.

    Args:
        classes, apply_se: number of outputs; False leaves squeeze-and-excite out, as the tutorial's functions do.
        classifier_activation: 'softmax', or None for logits, which training needs.
        image_size: H and W, one number for a square, None for any.

    Raises ValueError for a number of classes or an activation that does not exist.
    """
    return connect(_build_layers(classes, apply_se, classifier_activation), image_size, 'ghostnet_article')
