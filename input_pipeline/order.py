"""Which example stands at which position of training, and the key of its randomness."""
import functools
import threading

import numpy as np

_lock = threading.Lock()


# NumPy guarantees the raw stream of Philox for all versions, which it does not for shuffle() or permutation().
@functools.lru_cache(maxsize=3)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    order = np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(n), kind='stable')
    order.flags.writeable = False
    return order


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of `n` examples in epoch `epoch`; `seed` and `epoch` are at least 0.

    The example at position p of training is `permutation(seed, p // n, n)[p % n]`. The last three results are kept: a
    batch may straddle two epochs.

    Returns:
      int64 [n], read-only: each of 0..n-1 once.
    """
    # Under the lock, readers that reach a new epoch together sort once instead of once each.
    with _lock:
        return _permutation(seed, epoch, n)


def epoch_key(seed: int, epoch: int) -> int:
    """64 random bits as a signed integer; together with the number of an example they seed what is random in it."""
    # Another part of the stream than the permutation's, which begins at counter zero.
    return int(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1]).random_raw(1).view(np.int64)[0])
