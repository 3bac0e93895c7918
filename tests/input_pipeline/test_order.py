"""The order of examples is a permutation, uniform, and the same for everyone."""

import threading

import numpy as np
import pytest

from input_pipeline import order


@pytest.mark.parametrize('n', [1, 2, 37, 10_000, 1_281_167])
def test_each_example_once(n):
    np.testing.assert_array_equal(np.sort(order.permutation(3, 5, n)), np.arange(n))
    assert order.permutation(3, 5, n).dtype == np.int64


def test_depends_on_seed_and_epoch_and_on_nothing_else():
    first = order.permutation(1, 2, 1000).copy()
    for epoch in range(10):
        order.permutation(1, epoch, 1000)  # pushes the first result out of the cache
    np.testing.assert_array_equal(order.permutation(1, 2, 1000), first)
    assert (order.permutation(1, 3, 1000) != first).any()
    assert (order.permutation(2, 2, 1000) != first).any()
    assert (order.permutation(2, 1, 1000) != first).any()


def test_philox_is_the_published_one():
    # Random123's known answer for philox4x64-10 with counter and key zero; NumPy counts up before the first block.
    generator = np.random.Philox(key=[0, 0], counter=[2**64 - 1] * 4)
    assert [int(word) for word in generator.random_raw(4)] == [
        0x16554d9eca36314c, 0xdb20fe9d672d0fdc, 0xd7e772cee186176b, 0x7e68b68aec7ba23b]


def test_each_example_is_equally_likely_at_each_place():
    n, num_epochs = 64, 2000
    orders = np.stack([order.permutation(7, epoch, n) for epoch in range(num_epochs)])
    counts = np.stack([np.bincount(column, minlength=n) for column in orders.T])
    _assert_chi_square_is_one(counts, num_epochs / n, (n - 1) ** 2)


def test_each_example_is_equally_likely_after_each_other():
    n, num_epochs = 64, 2000
    orders = np.stack([order.permutation(11, epoch, n) for epoch in range(num_epochs)])
    counts = np.bincount((orders[:, :-1] * n + orders[:, 1:]).ravel(), minlength=n * n).reshape(n, n)
    assert not counts.diagonal().any()
    _assert_chi_square_is_one(counts[~np.eye(n, dtype=bool)], num_epochs / n, n * (n - 1))


def test_neighbours_and_epochs_are_uncorrelated():
    n = 1_281_167  # of ImageNet
    first, second = (order.permutation(5, epoch, n).astype(float) for epoch in (0, 1))
    for a, b in [(first[1:], first[:-1]), (first, second), (first, np.arange(n)), (first, order.permutation(6, 0, n))]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


def _assert_chi_square_is_one(counts, expected, freedom):
    per_freedom = ((counts - expected) ** 2 / expected).sum() / freedom
    assert abs(per_freedom - 1) < 5 * np.sqrt(2 / freedom)


def test_result_cannot_be_changed_under_another_reader():
    with pytest.raises(ValueError, match='read-only'):
        order.permutation(0, 0, 10)[0] = 1


def test_many_threads_get_the_same():
    results = []
    threads = [threading.Thread(target=lambda: results.append(order.permutation(9, 9, 5000))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_epoch_keys_differ():
    keys = {order.epoch_key(seed, epoch) for seed in range(50) for epoch in range(50)}
    assert len(keys) == 2500


# Blocks

@pytest.mark.parametrize('n', [1, 2, 15, 16, 37, 96, 10_001])
@pytest.mark.parametrize('block_size', [2, 5, 16, 64, 20_000])
def test_each_example_once_in_blocks(n, block_size):
    for epoch in range(4):
        result = order.permutation(3, epoch, n, block_size)
        np.testing.assert_array_equal(np.sort(result), np.arange(n))
        assert result.dtype == np.int64


def test_blocks_of_one_are_the_order_without_blocks():
    for n in (1, 2, 37, 1000):
        np.testing.assert_array_equal(order.permutation(3, 5, n, 1), order.permutation(3, 5, n))
        # By hand: the places of the sorted raw stream.
        raw = np.random.Philox(key=[3, 5]).random_raw(n)
        assert order.permutation(3, 5, n).tolist() == sorted(range(n), key=lambda i: int(raw[i]))


@pytest.mark.parametrize(('n', 'block_size'), [(1000, 16), (1003, 16), (960, 16), (517, 7), (40, 16)])
def test_blocks_are_neighbours_wherever_the_epoch_began(n, block_size):
    positions = np.arange(12 * n // block_size * block_size)
    numbers = np.array([order.permutation(2, p // n, n, block_size)[p % n] for p in positions.tolist()])
    num_broken = 0
    for block, epochs in zip(numbers.reshape(-1, block_size), (positions // n).reshape(-1, block_size)):
        if epochs[0] == epochs[-1]:
            in_order = np.sort(block)
            gaps = np.diff(in_order, append=in_order[0] + n)  # on a circle: after the last example comes the first
            assert (gaps == 1).sum() == block_size - 1
            num_broken += in_order[-1] - in_order[0] >= block_size
    assert num_broken <= 12  # one an epoch, around the end


def test_order_in_blocks_depends_on_seed_and_epoch():
    first = order.permutation(1, 2, 1000, 16).copy()
    order.permutation(1, 2, 1000, 8)
    np.testing.assert_array_equal(order.permutation(1, 2, 1000, 16), first)
    for other in ((1, 3, 1000, 16), (2, 2, 1000, 16), (1, 2, 1000, 8), (1, 2, 1000, 1)):
        assert (order.permutation(*other) != first).mean() > 0.9


@pytest.mark.parametrize(('n', 'block_size'), [(64, 4), (61, 4), (61, 16)])
def test_each_example_is_equally_likely_at_each_place_in_blocks(n, block_size):
    num_epochs = 4000
    orders = np.stack([order.permutation(7, epoch, n, block_size) for epoch in range(num_epochs)])
    # Places of one block are not independent: one of each that is far from the others.
    counts = np.stack([np.bincount(column, minlength=n) for column in orders.T[::2 * block_size]])
    _assert_chi_square_is_one(counts, num_epochs / n, counts.size - len(counts))


def test_each_block_is_equally_likely_after_each_other():
    # 18 blocks of 4; without the first and the last, which keep their places, 16 are permuted. 72 is divisible by 4.
    n, block_size, num_epochs = 72, 4, 4000
    orders = np.stack([order.permutation(11, epoch, n, block_size) for epoch in range(num_epochs)])
    blocks = orders.reshape(num_epochs, -1, block_size)
    begins = np.where(np.ptp(blocks, axis=2) < block_size, blocks.min(axis=2), -1)
    shift = begins[:, :1]
    numbers = ((begins - shift) % n // block_size)[(begins >= 0).all(axis=1)][:, 1:-1] - 1
    assert len(numbers) > num_epochs / 5  # where no block goes around the end
    counts = np.bincount((numbers[:, :-1] * 16 + numbers[:, 1:]).ravel(), minlength=256).reshape(16, 16)
    assert not counts.diagonal().any()
    _assert_chi_square_is_one(counts[~np.eye(16, dtype=bool)], len(numbers) / 16, 16 * 15)
    places = np.stack([np.bincount(column, minlength=16) for column in numbers.T])
    _assert_chi_square_is_one(places, len(numbers) / 16, 15 ** 2)


def test_within_a_block_each_order_is_equally_likely():
    orders = np.stack([order.permutation(13, epoch, 72, 4) for epoch in range(2000)]).reshape(-1, 4)
    whole = orders[np.ptp(orders, axis=1) == 3]
    counts = np.unique((whole - whole.min(axis=1, keepdims=True)) @ [1, 4, 16, 64], return_counts=True)[1]
    assert len(counts) == 24
    _assert_chi_square_is_one(counts, len(whole) / 24, 23)
