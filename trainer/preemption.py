"""Workers that are lost or hang: the others say which one, and end with exit code 75 within a bounded time.

TensorFlow reports a peer that died as an error of some collective, and a peer that hangs not at all; a process that
waits in a collective cannot be interrupted, only ended. Nothing is saved here: the last checkpoint is what is left.
"""
import math
import os
import sys
import threading
import time
from typing import NoReturn

import tensorflow as tf
from tensorflow.python.eager import context  # the only way to ask whether a peer is alive

from trainer.strategy import describe_worker, is_multi_worker

EXIT_PEER_LOST = 75
_PROBE_SECS = 5.0  # what an answer may take


class Watchdog:
    """Ends the process when a peer has not answered, or no call of `heard` has come, for too long.

    Used as a context; only what happens inside it is watched.

    Args:
        strategy: whose workers are watched; of 'multi_worker' each has strategy.peer_timeout_secs to answer.
        step_timeout_secs: from one call of `heard` to the next.
    """

    def __init__(self, strategy: tf.distribute.Strategy, step_timeout_secs: float):
        self._strategy, self._step_timeout_secs = strategy, step_timeout_secs
        self._peer_timeout_secs = strategy.peer_timeout_secs if is_multi_worker(strategy) else math.inf
        self._stopped, self._heard = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

    def heard(self) -> None:
        """To be called whenever the devices have returned a result."""
        self._heard = time.monotonic()

    def __enter__(self) -> 'Watchdog':
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()  # the thread is a daemon and may be amid a probe: nobody waits for it

    def _watch(self) -> None:
        answered = dict.fromkeys(_peers(self._strategy), time.monotonic())
        while not self._stopped.wait(min(10.0, self._peer_timeout_secs / 4, self._step_timeout_secs / 4)):
            answered |= {peer: time.monotonic() for peer in answered if _answers(peer)}
            silent = {peer: time.monotonic() - last for peer, last in answered.items()}
            waiting = time.monotonic() - self._heard
            if self._stopped.is_set():
                return
            for peer, secs in silent.items():
                if secs > self._peer_timeout_secs:
                    leave(f'{describe_worker(self._strategy, peer)} has not answered for {secs:.0f} s')
            if waiting > self._step_timeout_secs:
                leave(f'{_describe_this_worker(self._strategy)}: no step has returned for {waiting:.0f} s '
                      '(train.step_timeout_secs)')


def explain_lost_peer(strategy: tf.distribute.Strategy, error: tf.errors.OpError) -> str:
    """What to say of an error that a step on many workers ended with; '' if no peer is to blame."""
    kinds = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError,
             tf.errors.CancelledError, tf.errors.FailedPreconditionError, tf.errors.InternalError)
    if not is_multi_worker(strategy) or not isinstance(error, kinds):
        return ''
    silent = [describe_worker(strategy, peer) for peer in _peers(strategy) if not _answers(peer)]
    if silent:
        return f'lost {", ".join(silent)}'
    reason = next(iter(error.message.splitlines()), type(error).__name__)
    return f'a step with the other workers failed: {reason}'


def leave(message: str) -> NoReturn:
    """One line, and the end of the process: whatever waits for the lost peer would wait for ever."""
    print(f'\nerror: {message}; nothing new was saved: run the same command again', file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(EXIT_PEER_LOST)


def _describe_this_worker(strategy: tf.distribute.Strategy) -> str:
    return describe_worker(strategy, strategy.cluster_resolver.task_id) if is_multi_worker(strategy) else 'this process'


def _peers(strategy: tf.distribute.Strategy) -> list[int]:
    if not is_multi_worker(strategy):
        return []
    resolver = strategy.cluster_resolver
    return [i for i in range(len(resolver.cluster_spec().as_dict()['worker'])) if i != resolver.task_id]


def _answers(peer: int) -> bool:
    try:
        context.context().check_collective_ops_peer_health(f'/job:worker/replica:0/task:{peer}',
                                                           timeout_in_ms=int(1000 * _PROBE_SECS))
    except tf.errors.OpError:
        return False
    return True
