"""Losses: pure functions from logits to one number an example."""
import tensorflow as tf


def smoothed_cross_entropy(logits: tf.Tensor, labels: tf.Tensor, label_smoothing: float = 0.0) -> tf.Tensor:
    """Cross-entropy in nats, float32 [B], against (1 - s) * one_hot(label) + s / num_classes.

    logits: float32 [B, num_classes]. labels: int32 [B], 0 <= label < num_classes. label_smoothing: s, in [0, 1).
    Source: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, section 7.
    """
    log_probabilities = tf.nn.log_softmax(logits)
    loss = -tf.gather(log_probabilities, labels, batch_dims=1)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * tf.reduce_mean(log_probabilities, axis=-1)
    return loss
