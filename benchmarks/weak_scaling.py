"""Two workers of one core each against one worker with one core, the same batch a worker: what distribution costs.

    python benchmarks/weak_scaling.py

GhostNet 1.0 under MultiWorkerMirroredStrategy over loopback, synthetic images. The two take turns, and each efficiency
is the median of the ratios of neighbours. Needs two free cores. Prints one JSON object.
"""
import argparse
import json
import os
import socket
import statistics

from train_step import measure_in_process, result_of

CASES = {'224 px, batch 32 a worker': (224, 32, 4), '128 px, batch 16 a worker': (128, 16, 8)}


def images_per_sec(num_workers: int, image_size: int, rows: int, num_steps: int, cores: list[str],
                   all_reduce_dtype: str) -> float:
    """Of all workers together."""
    settings = {'image_size': image_size, 'global_batch_size': num_workers * rows, 'num_steps': num_steps,
                'all_reduce_dtype': all_reduce_dtype}
    if num_workers == 1:
        return result_of(measure_in_process(settings | {'name': 'one_device'}, cores=cores[0]))
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(num_workers)]
    addresses = [f'127.0.0.1:{each.getsockname()[1]}' for each in sockets]
    for each in sockets:
        each.close()
    processes = [measure_in_process(settings | {'name': 'multi_worker'}, cores=cores[i], TF_CONFIG=json.dumps(
        {'cluster': {'worker': addresses}, 'task': {'type': 'worker', 'index': i}})) for i in range(num_workers)]
    return [result_of(process) for process in processes][0]


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--all_reduce_dtype', default='float32', choices=['float32', 'bfloat16'])
    flags = parser.parse_args()
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    report = {'num_cores': len(cores), **vars(flags)}
    for case, (image_size, rows, num_steps) in CASES.items():
        one, two = [], []
        for _ in range(flags.repeats):
            one.append(images_per_sec(1, image_size, rows, num_steps, cores, flags.all_reduce_dtype))
            two.append(images_per_sec(2, image_size, rows, num_steps, cores, flags.all_reduce_dtype))
        ratios = [b / (2 * a) for a, b in zip(one, two)]
        report[case] = {'one': [round(rate, 1) for rate in one], 'two': [round(rate, 1) for rate in two],
                        'efficiency': round(statistics.median(ratios), 3)}
    print(json.dumps(report, indent=1))


if __name__ == '__main__':
    main()
