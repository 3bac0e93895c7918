"""GhostNet-class networks for Keras 3 on TensorFlow: [B, H, W, 3] normalised images -> float32 logits."""
from ghostnet import article
from ghostnet.model import GhostNet, count_macs, ghostnet

__all__ = ['GhostNet', 'article', 'count_macs', 'ghostnet', 'load_pytorch_weights', 'to_pytorch_state_dict']


def __getattr__(name):
    # Imported at first use, or else `python -m ghostnet.pytorch` would warn that it is imported already.
    if name in ('load_pytorch_weights', 'to_pytorch_state_dict'):
        from ghostnet import pytorch
        return getattr(pytorch, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
