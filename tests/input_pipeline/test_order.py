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
