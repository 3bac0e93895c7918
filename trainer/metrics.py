"""Metrics as sums on the device, divided once on the host."""
import tensorflow as tf

SUMS = ('examples', 'loss', 'top1', 'top5')  # what masked_sums counts


def is_in_top_k(logits: tf.Tensor, labels: tf.Tensor, k: int) -> tf.Tensor:
    """float32 [B]: 1 where fewer than k classes have a larger logit than the label, or the same and a lower number.

    That is argmax's order: equal logits for all are not right each time. Nor is a row with one that is not finite.
    """
    own = tf.gather(logits, labels[:, tf.newaxis], batch_dims=1)
    is_lower = tf.range(logits.shape[-1])[tf.newaxis] < labels[:, tf.newaxis]
    before = tf.reduce_sum(tf.cast((logits > own) | ((logits == own) & is_lower), tf.int32), axis=-1)
    return tf.cast((before < k) & tf.reduce_all(tf.math.is_finite(logits), axis=-1), tf.float32)


def masked_sums(logits: tf.Tensor, losses: tf.Tensor, labels: tf.Tensor, mask: tf.Tensor) -> dict[str, tf.Tensor]:
    """Sums over the rows whose mask is 1; 'examples' is their count. All float32 scalars."""
    return {'examples': tf.reduce_sum(mask), 'loss': tf.reduce_sum(tf.where(mask > 0, losses, 0.0)),
            **{f'top{k}': tf.reduce_sum(mask * is_in_top_k(logits, labels, k)) for k in (1, 5)}}
