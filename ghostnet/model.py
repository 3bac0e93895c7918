"""The GhostNet block table and the two forms of the network: the class `GhostNet` and the function `ghostnet`."""
import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from ghostnet.keyed import KeyedDropout
from ghostnet.layers import Composite, Conv, ConvBN, GhostBottleneck, fan_in_uniform, run_chain

# Paper table 1, as the authors' code has it; channels at width 1.
BLOCKS = (
    # kernel, expansion, filters, squeeze-and-excite ratio, strides
    (3, 16, 16, 0, 1),
    (3, 48, 24, 0, 2),
    (3, 72, 24, 0, 1),
    (5, 72, 40, 0.25, 2),
    (5, 120, 40, 0.25, 1),
    (3, 240, 80, 0, 2),
    (3, 200, 80, 0, 1),
    (3, 184, 80, 0, 1),
    (3, 184, 80, 0, 1),
    (3, 480, 112, 0.25, 1),
    (3, 672, 112, 0.25, 1),
    (5, 672, 160, 0.25, 2),
    (5, 960, 160, 0, 1),
    (5, 960, 160, 0.25, 1),
    (5, 960, 160, 0, 1),
    (5, 960, 160, 0.25, 1),
)
HEAD_FILTERS = 1280  # not scaled with the width
DROPOUT = {1: 0.2}  # by version


def make_divisible(channels: float, divisor: int = 4) -> int:
    """The multiple of `divisor` nearest to `channels`, but not below 90 % of it. Source: the authors' PyTorch code."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


@keras.saving.register_keras_serializable('ghostnet')
class Head(Composite):
    """[B, 1, 1, C] -> [B, HEAD_FILTERS]: 1x1 convolution with a bias and ReLU, no batch norm."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = Conv(HEAD_FILTERS, use_bias=True, name='conv')

    def call(self, x):
        return tf.squeeze(tf.nn.relu(self.conv(x)), axis=[1, 2])


class Chain(Composite, keras.Model):
    """The layers that build_layers(**config) gives, one after the other; built on construction."""

    def __init__(self, build_layers: Callable[..., list[keras.layers.Layer]], config: dict[str, Any], **kwargs):
        super().__init__(**kwargs)
        self.config = config
        self.chain = build_layers(**config)
        self.build((None, None, None, 3))

    def call(self, images, training=False):  # named and handed on, or else it is lost under stateless_call and fit
        return run_chain(self.chain, images, training=training)

    def get_config(self):
        return {**super().get_config(), **self.config}


def connect(layers: list[keras.layers.Layer], image_size: int | tuple[int, int] | None, name: str) -> keras.Model:
    """The layers, one after the other, as a functional model of images of H and W, or of a square, or of any size."""
    height, width = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    images = keras.Input((height, width, 3), name='images')
    return keras.Model(images, run_chain(layers, images), name=name)


def _build_layers(num_classes: int, width: float, version: int, dropout: float | None) -> list[keras.layers.Layer]:
    """The network as a chain; class and function form run the same one."""
    if version not in DROPOUT:
        raise ValueError(f'ghostnet.version is {version!r}; versions here: {sorted(DROPOUT)}')
    if not (isinstance(num_classes, int) and num_classes > 0):
        raise ValueError(f'ghostnet.num_classes is {num_classes!r}; it must be a positive integer')
    if not (isinstance(width, int | float) and 0 < width < math.inf):
        raise ValueError(f'ghostnet.width is {width!r}; it must be positive, as 0.5, 1.0 or 1.3')
    filters = make_divisible(16 * width)
    layers = [ConvBN(filters, kernel_size=3, strides=2, name='stem')]
    for number, (kernel_size, expansion, out, se_ratio, strides) in enumerate(BLOCKS, start=1):
        expansion, out = make_divisible(expansion * width), make_divisible(out * width)
        se_hidden = make_divisible(expansion * se_ratio) if se_ratio else None
        layers.append(GhostBottleneck(filters, expansion, out, kernel_size, strides, se_hidden, name=f'block_{number}'))
        filters = out
    return layers + [
        ConvBN(make_divisible(BLOCKS[-1][1] * width), name='tail'),
        keras.layers.GlobalAveragePooling2D('channels_last', keepdims=True, name='pool'),
        Head(name='head'),
        KeyedDropout(DROPOUT[version] if dropout is None else dropout, name='dropout'),
        keras.layers.Dense(num_classes, name='classifier', kernel_initializer=fan_in_uniform(HEAD_FILTERS),
                           dtype='float32'),  # logits are float32 whatever the compute dtype
    ]


@keras.saving.register_keras_serializable('ghostnet')
class GhostNet(Chain):
    """GhostNet as a class, built on construction. Arguments and tensors as in `ghostnet`; any image size."""

    def __init__(self, num_classes: int = 1000, width: float = 1.0, version: int = 1, *,
                 dropout: float | None = None, **kwargs):
        config = {'num_classes': num_classes, 'width': width, 'version': version, 'dropout': dropout}
        super().__init__(_build_layers, config, **kwargs)


def ghostnet(num_classes: int = 1000, width: float = 1.0, version: int = 1, *,
             image_size: int | tuple[int, int] | None = 224, dropout: float | None = None) -> keras.Model:
    """GhostNet as a functional Keras model: [B, H, W, 3] normalised images -> float32 logits [B, num_classes].

    Args:
        num_classes, version: number of logits; 1.
        width: multiplier of all channels but the 1280 of the head; 1.0 is 5.2 M parameters, 141 M multiply-adds.
        image_size: H and W, one number for a square, None for any.
        dropout: rate before the classifier; None takes the version's own (0.2).

    Raises ValueError for a version, number of classes, width or rate that does not exist.
    """
    return connect(_build_layers(num_classes, width, version, dropout), image_size, 'ghostnet')


def count_macs(model: keras.Model, image_size: int | tuple[int, int] = 224) -> int:
    """Multiply-adds of the convolutions and dense layers for one image, read off the traced graph."""
    height, width = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    spec = tf.TensorSpec([1, height, width, 3], tf.float32)
    graph = tf.function(lambda images: model(images, training=False)).get_concrete_function(spec).graph
    # Each element of a kernel takes one multiply-add at each place of the output.
    return sum(op.inputs[1].shape.num_elements() * math.prod(op.outputs[0].shape[:-1])
               for op in graph.get_operations() if op.type in ('Conv2D', 'DepthwiseConv2dNative', 'MatMul'))
