"""What ends a run before its time: a signal, a lost worker, which TensorFlow reports by an error, or a hanging one."""
import math
import os
import signal
import sys
import threading
import time

import tensorflow as tf
from tensorflow.python.eager import context  # the only way to ask whether a peer is alive

from trainer.exits import EXIT_STOPPED, end, leave, show
from trainer.strategy import describe_worker, find_worker, is_multi_worker


class StoppedEarly(Exception):
    """The run was asked to stop; once this has left `loop.train`, everything is saved."""


class StopSignals:
    """SIGTERM, SIGINT or SIGUSR1: calling the object tells whether one has come; a second one ends the process at once.

    Used as a context, in the main thread. Before the first call there is nothing to save, and one signal ends the
    process too. A signal that the process was started to ignore stays ignored.
    """

    _is_asked, _came_at = False, None

    def __call__(self) -> bool:
        self._is_asked = True
        return self._came_at is not None

    def __enter__(self) -> 'StopSignals':
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1  # srun hands the last one on
        self._before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
        self.install()
        # Python calls its handlers only once TensorFlow has returned; this descriptor has the number at once.
        self._fd_before = signal.set_wakeup_fd(self._writer)
        threading.Thread(target=self._watch, name='stop signals', daemon=True).start()
        return self

    def install(self) -> None:
        """To be called again after a strategy of many workers has been built, which takes SIGTERM for itself."""
        for number in self._before:
            signal.signal(number, lambda *_: None)
            signal.siginterrupt(number, False)  # or a write of TensorFlow's could fail

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)  # which ends the thread

    def _watch(self) -> None:
        with open(self._reader, 'rb', buffering=0) as reader:
            while came := reader.read(1):
                if came[0] not in self._before:
                    continue
                name = signal.Signals(came[0]).name
                if not self._is_asked:
                    end(EXIT_STOPPED, f'{name}: nothing to save yet; the same command starts again')
                if self._came_at is None:
                    self._came_at = time.monotonic()
                    show(f'\n{name}: stopping and saving at the end of this loop of steps (a later one ends it)\n',
                         sys.stderr)
                elif time.monotonic() - self._came_at >= 2:  # sooner it is the same one, of systemd and of a launcher
                    end(128 + came[0], f'{name} again: the last checkpoint stays; the same command resumes')


class Watchdog:
    """A context that ends the process if a peer has not answered, or no call of `heard` has come, for too long."""

    def __init__(self, strategy: tf.distribute.Strategy, step_timeout_secs: float):
        self._strategy, self._step_timeout_secs = strategy, step_timeout_secs
        self._stopped, self._heard = threading.Event(), time.monotonic()

    def heard(self) -> None:
        """To be called whenever the devices have returned a result."""
        self._heard = time.monotonic()

    def __enter__(self) -> 'Watchdog':
        threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()  # the thread is a daemon and may be amid a probe: nobody waits for it

    def _watch(self) -> None:
        peer_timeout_secs = self._strategy.peer_timeout_secs if is_multi_worker(self._strategy) else math.inf
        own, num_workers = find_worker(self._strategy)
        answered = {peer: time.monotonic() for peer in range(num_workers) if peer != own}
        while not self._stopped.wait(min(10.0, peer_timeout_secs / 4, self._step_timeout_secs / 4)):
            answered |= {peer: time.monotonic() for peer in answered if _answers(peer)}
            now = time.monotonic()
            if self._stopped.is_set():
                return
            for peer, last in answered.items():
                if now - last > peer_timeout_secs:
                    leave(f'{describe_worker(self._strategy, peer)} has not answered for {now - last:.0f} s')
            if (waiting := now - self._heard) > self._step_timeout_secs:
                worker = describe_worker(self._strategy) if is_multi_worker(self._strategy) else 'this process'
                leave(f'{worker}: no step has returned for {waiting:.0f} s (train.step_timeout_secs)')


def leave_to_try_again(strategy: tf.distribute.Strategy, error: tf.errors.OpError) -> None:
    """Ends the process if this error, of a step, is a peer's, or of reading data, which a network disk may do once."""
    if (at := max(map(error.message.find, ('[Errno ', 'UnavailableError: ')))) >= 0:
        leave(f'the data cannot be read: {error.message[at:].splitlines()[0]}')
    kinds = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError,
             tf.errors.CancelledError, tf.errors.FailedPreconditionError, tf.errors.InternalError)
    if is_multi_worker(strategy) and isinstance(error, kinds):
        own, num_workers = find_worker(strategy)
        silent = [describe_worker(strategy, i) for i in range(num_workers) if i != own and not _answers(i)]
        reason = next(iter(error.message.splitlines()), type(error).__name__)
        leave(f'lost {", ".join(silent)}' if silent else f'a step with the other workers failed: {reason}')


def _answers(peer: int) -> bool:
    try:
        context.context().check_collective_ops_peer_health(f'/job:worker/replica:0/task:{peer}', timeout_in_ms=5000)
    except tf.errors.OpError:
        return False
    return True
