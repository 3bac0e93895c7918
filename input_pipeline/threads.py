"""The threads that read and decode, one for each core the process may use; they are done before the interpreter is."""
import atexit
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait

NUM = len(os.sched_getaffinity(0))
_POOL = ThreadPoolExecutor(NUM, 'input')
_callers = []  # an entry for each thread of tf.data's in for_each


def for_each(function: Callable[[int], None], items: Iterable[int]) -> None:
    """function(item) of every item, several at a time, in any order; of those that raise, the first one's error.

    Does little or nothing once the interpreter is exiting, when tf.data still fills its buffers.
    """
    _callers.append(None)
    futures = []
    try:
        futures.extend(_POOL.submit(function, item) for item in items)
    except RuntimeError as error:
        if 'shutdown' not in str(error):  # of the pool, which the interpreter closes when it exits
            raise  # no thread can be started
    finally:
        wait(futures)
        _callers.pop()
    for future in futures:
        future.result()


@atexit.register
def _wait_for_callers() -> None:
    # A thread that comes back to an interpreter that is gone hangs, or aborts the process. Until none has been seen for
    # a tenth of a second: tf.data starts a few more calls, which return at once.
    num_unseen = 0
    while num_unseen < 10:
        time.sleep(0.01)
        num_unseen = 0 if _callers else num_unseen + 1
