"""Two workers of one core each against one worker with one core, the same batch a worker: what distribution costs.

    python benchmarks/weak_scaling.py

GhostNet 1.0 under MultiWorkerMirroredStrategy over loopback, synthetic images. Measured in turns: one worker alone; two
that run at the same time and do not talk to each other, which shows what they lose by sharing caches and memory; two
that do talk, with gradients sent as float32 and as bfloat16. Efficiencies are medians of the ratios of neighbours,
against the one and against the two that do not talk. Needs two free cores. Prints one JSON object.
"""
import argparse
import json
import os
import socket
import statistics

from train_step import measure_in_process, result_of

CASES = {'224 px, batch 32 a worker': (224, 32, 4), '128 px, batch 16 a worker': (128, 16, 8)}


def start(name: str, image_size: int, rows: int, num_steps: int, core: int, dtype: str = 'float32', **variables: str):
    """One worker's process, on one core."""
    settings = {'name': name, 'image_size': image_size, 'global_batch_size': rows, 'num_steps': num_steps,
                'all_reduce_dtype': dtype}
    return measure_in_process(settings, cores=str(core), **variables)


def rate_together(image_size: int, rows: int, num_steps: int, cores: list[int], dtype: str) -> float:
    """Images a second over all workers of one run."""
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in cores]
    addresses = [f'127.0.0.1:{each.getsockname()[1]}' for each in sockets]
    for each in sockets:
        each.close()
    processes = [start('multi_worker', image_size, rows * len(cores), num_steps, core, dtype, TF_CONFIG=json.dumps(
        {'cluster': {'worker': addresses}, 'task': {'type': 'worker', 'index': i}})) for i, core in enumerate(cores)]
    return [result_of(process) for process in processes][0]


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=3)
    flags = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    report = {'cores': cores, **vars(flags)}
    for case, sizes in CASES.items():
        rates = {way: [] for way in ('alone', 'apart', 'float32', 'bfloat16')}
        for _ in range(flags.repeats):
            rates['alone'].append(result_of(start('one_device', *sizes, cores[0])))
            apart = [start('one_device', *sizes, core) for core in cores]
            rates['apart'].append(sum(result_of(each) for each in apart))
            for dtype in ('float32', 'bfloat16'):
                rates[dtype].append(rate_together(*sizes, cores, dtype))

        def ratio(way, of, times, rates=rates):
            return round(statistics.median(a / (times * b) for a, b in zip(rates[way], rates[of], strict=True)), 3)

        report[case] = {
            'images_per_sec': {way: [round(rate, 1) for rate in each] for way, each in rates.items()},
            'efficiency against one alone': {way: ratio(way, 'alone', 2) for way in ('apart', 'float32', 'bfloat16')},
            'efficiency against two apart': {way: ratio(way, 'apart', 1) for way in ('float32', 'bfloat16')}}
    print(json.dumps(report, indent=1))


if __name__ == '__main__':
    main()
