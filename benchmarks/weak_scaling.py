"""Two workers of one core each against one worker with one core, the same batch a worker: what distribution costs.

    python benchmarks/weak_scaling.py

GhostNet 1.0 under MultiWorkerMirroredStrategy over loopback, synthetic images. All processes are started at first, and
take turns of seconds:
  alone             one worker, on one core and then on the other; the sum
  apart             two at the same time that know nothing of each other: what sharing caches and memory costs
  apart, in step    the same, each step begun when both have done the one before: what the slower one of each step
                    costs, which nothing that trains synchronously can save
  float32, bfloat16 two that train together, gradients sent so
Efficiencies are medians over the rounds. Needs two free cores and 14 GB. Prints one JSON object.
"""
import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

from train_step import ask, rates_in_turns, start

CASES = {'224 px, batch 32 a worker': (224, 32, 2), '128 px, batch 16 a worker': (128, 16, 5)}


def start_workers(image_size: int, rows: int, cores: list[int], dtype: str) -> list[subprocess.Popen]:
    """The processes of one run."""
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in cores]
    addresses = [f'127.0.0.1:{each.getsockname()[1]}' for each in sockets]
    for each in sockets:
        each.close()
    settings = {'name': 'multi_worker', 'image_size': image_size, 'global_batch_size': rows * len(cores),
                'all_reduce_dtype': dtype}
    return [start(settings, str(core), TF_CONFIG=json.dumps(
        {'cluster': {'worker': addresses}, 'task': {'type': 'worker', 'index': i}})) for i, core in enumerate(cores)]


def measure(image_size: int, rows: int, num_steps: int, cores: list[int], rounds: int) -> dict[str, list[float]]:
    """Images a second over both cores, of each way and round."""
    one = {'name': 'one_device', 'image_size': image_size, 'global_batch_size': rows}
    apart = [start(one, str(core)) for core in cores]
    talking = {dtype: start_workers(image_size, rows, cores, dtype) for dtype in ('float32', 'bfloat16')}

    def in_step():
        begin = time.perf_counter()
        for _ in range(num_steps):
            ask(apart, 1)
        return num_steps * rows * len(apart) / (time.perf_counter() - begin)

    return rates_in_turns([*apart, *talking['float32'], *talking['bfloat16']], {
        'alone': lambda: sum(ask([process], num_steps)[0] for process in apart),
        'apart': lambda: sum(ask(apart, num_steps)),
        'apart, in step': in_step,
        'float32': lambda: min(ask(talking['float32'], num_steps)),  # each gives the rate of both
        'bfloat16': lambda: min(ask(talking['bfloat16'], num_steps))}, rounds)


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--case', choices=CASES, action='append', help='all by default')
    flags = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    report = {'cores': cores, 'rounds': flags.rounds}
    for case in flags.case or CASES:
        rates = measure(*CASES[case], cores, flags.rounds)

        def efficiency(of, rates=rates):
            return {way: round(statistics.median(a / b for a, b in zip(each, rates[of], strict=True)), 3)
                    for way, each in rates.items()}

        report[case] = {'images_per_sec': {way: [round(rate, 1) for rate in each] for way, each in rates.items()},
                        'against alone': efficiency('alone'), 'against apart, in step': efficiency('apart, in step')}
        print(case, report[case], file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == '__main__':
    main()
