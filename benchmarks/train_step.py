"""How many images a second a whole training step takes in on this machine's CPU, without input: ways to use the cores.

    python benchmarks/train_step.py --image_size=56 --global_batch_size=128

Compares one part a batch under TensorFlow's own threads, parts that run side by side (train.accumulate and
build_strategy.op_threads = 1), and replicas on logical CPUs; with --other_root the parts of another checkout, with
--other_python PyTorch (train_step_timm.py), also with glibc told to keep its memory as build_strategy does. Each way
is a process of its own, since threads are set once for a process; the ways take turns of seconds, and the medians
count. Prints one JSON object.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from turns import answer

ROOT = Path(__file__).resolve().parent.parent


def make_measure(image_size: int, global_batch_size: int, *, width: float = 1.0, accumulate: int = 1,
                 all_reduce_dtype: str = 'float32', **strategy_settings) -> Callable[[int], float]:
    """measure(num_steps), images a second over all workers; compiled and warm."""
    sys.path.insert(0, str(ROOT))
    from trainer.main import import_tensorflow
    import_tensorflow()
    import numpy as np
    import tensorflow as tf

    from ghostnet import ghostnet
    from trainer import optimizer, schedule
    from trainer.recipe import Train
    from trainer.state import build_model_and_state
    from trainer.step import distribute, make_normalize, make_train_loop
    from trainer.strategy import build_strategy

    strategy = build_strategy(**strategy_settings)
    settings = Train(epochs=1, global_batch_size=global_batch_size, accumulate=accumulate, label_smoothing=0.1,
                     all_reduce_dtype=all_reduce_dtype, jit=False, model=lambda: ghostnet(1000, width, image_size=None),
                     optimizer=lambda: optimizer.sgd(momentum=0.9, nesterov=True, weight_decay=4e-5),
                     schedule=schedule.cosine)
    model, state, update = build_model_and_state(settings, strategy, 1000)
    train_loop = make_train_loop(
        strategy, model, state, settings, normalize=make_normalize((0.5,) * 3, (0.25,) * 3), update_fn=update,
        schedule=schedule.cosine(0.1, num_steps=10_000))

    def make_dataset(shard: int, num_shards: int) -> tf.data.Dataset:
        rows, rng = global_batch_size // num_shards, np.random.default_rng(shard)
        return tf.data.Dataset.from_tensors({
            'image': rng.integers(0, 256, (rows, image_size, image_size, 3), np.uint8),
            'label': rng.integers(0, 1000, rows).astype(np.int32), 'index': np.arange(rows),
            'mask': np.ones(rows, np.float32)}).repeat()

    batches = iter(distribute(strategy, make_dataset))

    def measure(num_steps: int) -> float:
        start = time.perf_counter()
        float(train_loop(batches, tf.constant(num_steps))['loss'])
        return num_steps * global_batch_size / (time.perf_counter() - start)

    measure(2)
    return measure


def start(settings: dict, cores: str | None = None, root: Path = ROOT, **variables: str) -> subprocess.Popen:
    """A process with `make_measure(**settings)` of this checkout on these cores, which waits until it is told to."""
    command = [sys.executable, str(root / 'benchmarks/train_step.py'), '--serve', json.dumps(settings)]
    return run((['taskset', '-c', cores] if cores else []) + command, **variables)


def run(command: list[str], **variables: str) -> subprocess.Popen:
    """A process that measures when it is told to, with these environment variables; in large pages, as trainer.main."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env={'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1', **os.environ, **variables})


def serve(measure: Callable[[int], float]) -> None:
    """That process: for each number of steps that it reads, prints the rate."""
    print(json.dumps('ready'), flush=True)
    for line in sys.stdin:
        print(measure(int(line)), flush=True)


def ask(processes: Sequence[subprocess.Popen], num_steps: int) -> list[float]:
    """The rates of processes that measure at the same time."""
    for process in processes:
        print(num_steps, file=process.stdin, flush=True)
    return [answer(process, 'a measurement') for process in processes]


def rates_in_turns(processes: Sequence[subprocess.Popen], ways: Mapping[str, Callable[[], float]],
                   rounds: int) -> dict[str, list[float]]:
    """Each way measured once a round, in another order each round, by these processes, which it ends."""
    for process in processes:
        answer(process, 'a measurement')  # that it is ready
    order, rates = random.Random(0), {way: [] for way in ways}
    for _ in range(rounds):
        for way in order.sample(list(ways), len(ways)):
            rates[way].append(ways[way]())
    for process in processes:
        process.kill()
    return rates


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--image_size', type=int, default=56)
    parser.add_argument('--global_batch_size', type=int, default=128)
    parser.add_argument('--num_steps', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--other_root', type=Path, help='another checkout of this project')
    parser.add_argument('--other_python', help='the Python that has torch and timm')
    parser.add_argument('--serve', type=json.loads, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        serve(make_measure(**flags.serve))
        return
    cores = len(os.sched_getaffinity(0))
    ways = {"one part, TensorFlow's threads": {'name': 'one_device'},
            'one part, one thread an operation': {'name': 'one_device', 'op_threads': 1},
            (parts := f'{cores} parts, one thread an operation'): {
                'name': 'one_device', 'op_threads': 1, 'accumulate': cores},
            f'{cores} replicas, one thread an operation': {'name': 'mirrored', 'num_devices': cores, 'op_threads': 1}}
    shared = {'image_size': flags.image_size, 'global_batch_size': flags.global_batch_size}
    processes = {way: start(shared | settings) for way, settings in ways.items()}
    if flags.other_root:
        processes[f'{parts}, {flags.other_root}'] = start(shared | ways[parts], root=flags.other_root)
    if flags.other_python:
        command = [flags.other_python, str(ROOT / 'benchmarks/train_step_timm.py'),
                   *(f'--{name}={value}' for name, value in shared.items())]
        processes['PyTorch'] = run(command)
        processes['PyTorch, memory kept'] = run(
            command, GLIBC_TUNABLES='glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647')
    rates = rates_in_turns([*processes.values()], {
        way: lambda process=process: ask([process], flags.num_steps)[0] for way, process in processes.items()},
        flags.rounds)
    summary = {way: {'median': round(statistics.median(r)), 'min': round(min(r)), 'max': round(max(r))}
               for way, r in rates.items()}
    print(json.dumps(shared | {'num_cores': cores, 'num_steps': flags.num_steps, 'rounds': flags.rounds,
                               'images_per_sec': summary}, indent=1))


if __name__ == '__main__':
    main()
