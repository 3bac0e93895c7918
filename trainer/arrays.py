"""`trainer.train`: trains a Keras model on images in memory, through the pipeline, step and loop of the command."""
import hashlib
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import input_pipeline
from trainer import loop, optimizer, schedule
from trainer.recipe import NOT_IN_FINGERPRINT, Data, Train
from trainer.state import num_logits


def train(model: keras.Model, images: np.ndarray, labels: np.ndarray, *, epochs: float, global_batch_size: int,
          eval_data: tuple[np.ndarray, np.ndarray] | None = None, workdir: str | Path | None = None,
          peak_rate: float = 0.1, warmup_epochs: float = 0.0, momentum: float = 0.9, nesterov: bool = True,
          weight_decay: float = 4e-5, image_size: int | None = None, max_shift: int = 0, flip: bool = False,
          pixel_mean: tuple[float, ...] = Data.pixel_mean, pixel_std: tuple[float, ...] = Data.pixel_std,
          **settings: Any) -> dict[str, float]:
    """Trains `model` in place with SGD under a cosine and returns the final metrics, 'eval/top1' and so on.

    Runs under the strategy whose scope encloses the call, which must be the one the model was built in. Raises
    ConfigError for settings that do not fit each other, the data or the workdir; DataError for wrong arrays.

    Args:
        model: [B, H, W, 3] normalised images -> logits [B, num_classes].
        images, labels: uint8 [N, H, W, 3] or [N, H, W], and integers [N], 0 <= label < num_classes.
        epochs, global_batch_size: as in recipe.Train; so are `settings`, as seed=1 or ema_decay=0.999.
        eval_data: (images, labels) to evaluate after each epoch. workdir: where a run is kept and resumed, if anywhere.
        peak_rate, warmup_epochs: of schedule.cosine. momentum, nesterov, weight_decay: of optimizer.sgd.
        image_size: height and width in pixels that images are resized to. None: the images' own, which are then square.
        max_shift, flip: augmentation, see input_pipeline. pixel_mean, pixel_std: of R, G, B in 0..1.
    """
    size = image_size or images.shape[1]
    train_settings = Train(
        epochs=epochs, global_batch_size=global_batch_size, model=lambda: model,
        optimizer=partial(optimizer.sgd, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay),
        schedule=partial(schedule.cosine, peak_rate, warmup_epochs=warmup_epochs), **settings)
    arguments = (epochs, global_batch_size, peak_rate, warmup_epochs, momentum, nesterov, weight_decay, size, max_shift,
                 flip, pixel_mean, pixel_std, sorted(f'{name}={value!r}' for name, value in settings.items()
                                                     if not NOT_IN_FINGERPRINT.fullmatch(f'train.{name}')))
    fingerprint = {'images': hashlib.sha256(np.ascontiguousarray(images)).hexdigest(),
                   'labels': hashlib.sha256(np.ascontiguousarray(labels)).hexdigest(), 'arguments': repr(arguments)}
    with tempfile.TemporaryDirectory() as temporary:
        return loop.train(
            train_settings, Data('arrays', pixel_mean=pixel_mean, pixel_std=pixel_std),
            strategy=tf.distribute.get_strategy(), workdir=Path(temporary if workdir is None else workdir),
            train_source=input_pipeline.array_source(images, labels, num_logits(model)),
            eval_source=input_pipeline.array_source(*eval_data, num_logits(model)) if eval_data else None,
            train_dataset=partial(input_pipeline.train_dataset, image_size=size, flip=flip,
                                  crop=input_pipeline.make_random_shift(max_shift)),
            eval_dataset=partial(input_pipeline.eval_dataset, image_size=size, resize=size, interpolation='bilinear'),
            fingerprint=fingerprint, write_config=lambda workdir: None)
