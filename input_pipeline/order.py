"""Which example stands at which position of training, and the key of its randomness."""
import functools

import numpy as np


# NumPy guarantees the raw stream of Philox for all versions, which it does not for shuffle() or permutation().
@functools.lru_cache(maxsize=3)  # a batch may straddle two epochs
def permutation(seed: int, epoch: int, n: int, block_size: int = 1) -> np.ndarray:
    """int64 [n], read-only: 0..n-1 in the order of epoch `epoch`; `seed` and `epoch` are at least 0.

    The example at position p of training is `permutation(seed, p // n, n)[p % n]`. With `block_size` > 1 blocks of
    neighbours are permuted, and the examples inside of each, so that one read serves many: a block begins at every
    position of training that block_size divides, and ends early only where the epoch does.
    """
    philox = np.random.Philox(key=[seed, epoch])
    order = np.argsort(philox.random_raw(n), kind='stable')
    if block_size > 1:
        # The first and the last block of an epoch may be cut short, and keep their places; all is turned by a random
        # number of examples, so that they are others in each epoch.
        blocks = (epoch * n % block_size + np.arange(n)) // block_size
        keys = philox.random_raw(blocks[-1] + 1)
        keys[0], keys[-1] = 0, np.iinfo(np.uint64).max
        order = (order[np.argsort(keys[blocks[order]], kind='stable')] + philox.random_raw() % n) % n
    order.flags.writeable = False
    return order


def epoch_key(seed: int, epoch: int) -> int:
    """64 random bits as a signed integer; together with the number of an example they seed what is random in it."""
    # Another part of the stream than the permutation's, which begins at counter zero.
    return int(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1]).random_raw(1).view(np.int64)[0])
