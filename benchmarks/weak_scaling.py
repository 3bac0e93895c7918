"""Two workers of one core each against one worker with one core, the same batch a worker: what distribution costs.

    python benchmarks/weak_scaling.py

GhostNet 1.0 under MultiWorkerMirroredStrategy over loopback, synthetic images. All processes are started at first, and
take turns of seconds: one worker alone, on either core; two that run at the same time and do not talk to each other,
which shows what they lose by sharing caches and memory; two that do talk, with gradients sent as float32 and as
bfloat16. Efficiencies are medians over the rounds, against the mean of those alone and against the two that do not
talk. Needs two free cores and 12 GB. Prints one JSON object.
"""
import argparse
import json
import os
import socket
import statistics
import sys

from train_step import start, take_turns

CASES = {'224 px, batch 32 a worker': (224, 32, 2), '128 px, batch 16 a worker': (128, 16, 5)}


def start_workers(image_size: int, rows: int, cores: list[int], dtype: str) -> list:
    """The processes of one run."""
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in cores]
    addresses = [f'127.0.0.1:{each.getsockname()[1]}' for each in sockets]
    for each in sockets:
        each.close()
    settings = {'name': 'multi_worker', 'image_size': image_size, 'global_batch_size': rows * len(cores),
                'all_reduce_dtype': dtype}
    return [start(settings, str(core), TF_CONFIG=json.dumps(
        {'cluster': {'worker': addresses}, 'task': {'type': 'worker', 'index': i}})) for i, core in enumerate(cores)]


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=40)
    flags = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    report = {'cores': cores, **vars(flags)}
    for case, (image_size, rows, num_steps) in CASES.items():
        one = {'name': 'one_device', 'image_size': image_size, 'global_batch_size': rows}
        apart = [start(one, str(core)) for core in cores]
        talking = {dtype: start_workers(image_size, rows, cores, dtype) for dtype in ('float32', 'bfloat16')}
        rates = take_turns({'alone 0': apart[:1], 'alone 1': apart[1:], 'apart': apart, **talking}, num_steps,
                           flags.rounds)
        # Each of two workers that talk gives the rate of both.
        sums = {way: [sum(pair) / len(pair) for pair in rates[way]] for way in talking} | {
            'apart': [sum(pair) for pair in rates['apart']],
            'alone': [a + b for (a,), (b,) in zip(rates['alone 0'], rates['alone 1'], strict=True)]}

        def ratio(way, of, sums=sums):
            return round(statistics.median(a / b for a, b in zip(sums[way], sums[of], strict=True)), 3)

        report[case] = {
            'images_per_sec': {way: [round(rate, 1) for rate in sorted(each)] for way, each in sums.items()},
            'efficiency against each alone': {way: ratio(way, 'alone') for way in ('apart', 'float32', 'bfloat16')},
            'efficiency against two apart': {way: ratio(way, 'apart') for way in ('float32', 'bfloat16')}}
        print(case, report[case], file=sys.stderr, flush=True)
    print(json.dumps(report, indent=1))


if __name__ == '__main__':
    main()
