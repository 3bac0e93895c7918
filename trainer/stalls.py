"""Stalls: what the steps wait for when they wait for data, and what would help."""
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping

_REMEDIES = {'read': 'a faster disk or, for files far away, train_dataset.shuffle_block',
             'decode': 'more cores (above six: more processes), smaller files, or a smaller train_dataset.image_size',
             'augment': 'more cores, or another train_dataset.augment',
             **dict.fromkeys(['batch', 'copy'], 'a smaller train_dataset.image_size, or more workers')}


class Stalls:
    """What steps and threads of the input pipeline did since the last report; this is `worker` of `num_workers`."""

    def __init__(self, sum_over_workers: Callable[[int], int], worker: int, num_workers: int):
        self._sum_over_workers, self._worker, self._num_workers = sum_over_workers, worker, num_workers
        self._num_threads, self._lock = len(os.sched_getaffinity(0)), threading.Lock()
        self._secs, self._said = Counter(), set()

    def spent(self, secs: Mapping[str, float]) -> None:
        """What the input pipeline calls, in any thread: seconds by stage."""
        with self._lock:
            self._secs.update(secs)

    def spent_on_steps(self, secs: float, wait_secs: float, is_traced: bool) -> None:
        """Counts a loop of steps; one that has compiled says nothing of the input, nor does what was read before."""
        if is_traced:
            self.spent({'steps': secs, 'wait': wait_secs})
        else:
            self._secs = Counter()

    def metrics(self) -> dict[str, float]:
        """The worst worker's 'train/worst_data_wait', a part of its time, and 'train/input_<stage>', of its threads'.

        'copy' is what they are idle: steps that wait all the same wait for batches being put together and copied to the
        device. A sentence says, once for each stage, what makes steps wait. To be called by all workers together.
        """
        with self._lock:
            secs, self._secs = self._secs, Counter()
        steps = secs['steps'] or math.inf  # none if only one that compiled was reported
        own = {stage: secs[stage] / steps / self._num_threads for stage in _REMEDIES}
        own['copy'] = max(0.0, 1 - sum(own.values()))
        waits = [self._value_of(worker, min(1.0, secs['wait'] / steps)) for worker in range(self._num_workers)]
        wait, worst = max(waits), waits.index(max(waits))
        found = {stage: self._value_of(worst, share) for stage, share in own.items()}
        stage = max(found, key=found.get)
        if wait > 0.05 and stage not in self._said:  # less is not worth saying
            self._said.add(stage)
            where = f' on worker {worst}, the worst' if self._num_workers > 1 else ''
            shares = ', '.join(f'{name} took {100 * share:.0f} %' for name, share in found.items())
            logging.warning('steps waited for data %.0f %% of their time%s; of that of its %d input threads %s; the '
                            'input must become %.2f times as fast, %s first: %s', 100 * wait, where, self._num_threads,
                            shares, 1 / max(1 - wait, 0.01), stage, _REMEDIES[stage])
        return {'train/worst_data_wait': wait} | {f'train/input_{name}': share for name, share in found.items()}

    def _value_of(self, worker: int, value: float) -> float:
        """What that worker has as `value`; to six digits behind the point."""
        return self._sum_over_workers(round(1e6 * value) if worker == self._worker else 0) / 1e6
