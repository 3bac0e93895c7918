"""Saving beside the training: in a thread, and again where it fails. checkpoint.py knows how one save is made whole."""
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow as tf

from trainer import checkpoint
from trainer.recipe import Train

_RETRY_SECS = 5.0  # between two attempts


class SaveError(Exception):
    """Nothing could be saved for too long."""


class Saver:
    """Saves variables, by the names they are stored under, to `directory`; nothing if None: one of many workers saves.

    A disk that is full or cannot be written stops the training, by a SaveError, only after train.save_retry_secs.
    """

    def __init__(self, directory: Path | None, variables: Mapping[str, tf.Variable], settings: Train):
        self._directory, self._variables = directory, variables
        self._every_secs, self._retry_secs = settings.checkpoint_every_secs or math.inf, settings.save_retry_secs
        self._retention = {'keep': settings.keep_checkpoints, 'keep_every': settings.keep_every_steps,
                           'periodic': settings.checkpoint_every_steps}
        self._pool, self._job = ThreadPoolExecutor(1, 'saver'), None
        self._failing_since, self._tried_at = math.inf, time.monotonic()

    def save(self, step: int, meta: Mapping[str, Any]) -> None:
        """Starts to save the values of now; waits first for the save before it."""
        if self._directory is None:
            return
        self._collect()
        self._arguments = self._directory, step, {name: v.numpy() for name, v in self._variables.items()}, meta
        self._submit()

    def is_due(self) -> bool:
        """Whether the clock wants a save or the last one has failed. Raises SaveError if none succeeds for too long."""
        if self._job and self._job.done():
            self._collect()
        every_secs = self._every_secs if self._failing_since == math.inf else min(_RETRY_SECS, self._every_secs)
        return self._directory is not None and time.monotonic() - self._tried_at >= every_secs

    def finish(self, secs: float, sum_over_workers: Callable[[int], int]) -> None:
        """All workers wait until the last save is committed, tried again for at most `secs`. Raises SaveError."""
        self._retry_secs = min(secs, self._retry_secs)
        self._failing_since = max(self._failing_since, time.monotonic())  # infinite, or counted anew
        self._collect()
        while sum_over_workers(int(self._failing_since < math.inf)):  # asked all the time, or the others would give up
            time.sleep(1.0)
            if self._failing_since < math.inf:
                self._submit()
                self._collect()

    def _submit(self) -> None:
        self._tried_at = time.monotonic()
        self._job = self._pool.submit(checkpoint.save, *self._arguments, **self._retention)

    def _collect(self) -> None:
        job, self._job = self._job, None
        try:
            if job:
                job.result()
                self._failing_since = math.inf
        except (OSError, tf.errors.OpError) as error:
            now = time.monotonic()
            self._failing_since = min(self._failing_since, now)
            reason = str(error).splitlines()[0]
            if now - self._failing_since >= self._retry_secs:
                raise SaveError(f'nothing could be saved in {self._directory} for {now - self._failing_since:.0f} s '
                                f'(train.save_retry_secs): {reason}') from error
            logging.warning('CANNOT SAVE in %s: %s; training goes on and tries again, for at most %g s',
                            self._directory, reason, self._retry_secs)


def keep_best(directory: Path, step: int, results: Mapping[str, float], variables: Mapping[str, tf.Variable],
              meta: Mapping[str, Any]) -> None:
    """Keeps one checkpoint, that of the best top-1; averaged weights count where they are kept."""
    tag = 'eval_ema/top1' if 'eval_ema/top1' in results else 'eval/top1'
    whole = [path for path in checkpoint.list_checkpoints(directory) if not checkpoint.find_damage(path)]
    if not whole or results[tag] > checkpoint.read_meta(whole[-1])['metrics'][tag]:
        try:
            checkpoint.save(directory, step, variables, meta={**meta, 'metrics': dict(results)}, keep=1)
        except (OSError, tf.errors.OpError) as error:
            logging.warning('CANNOT SAVE the best checkpoint in %s: %s', directory, str(error).splitlines()[0])
