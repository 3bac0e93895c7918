"""Two workers of one core each against one worker with one core, the same batch a worker: what distribution costs.

    python benchmarks/weak_scaling.py

GhostNet 1.0 under MultiWorkerMirroredStrategy over loopback, synthetic images. All processes are started at first, and
take turns of seconds:
  alone             one worker, on one core and then on the other; the sum
  apart             two at the same time that know nothing of each other: what sharing caches and memory costs
  apart, in step    the same, each step begun when both have done the one before: what the slower one of each step
                    costs, which nothing that trains synchronously can save
  float32, bfloat16 two that train together, gradients sent so
  ... at best       in step, and after each step the time that TensorFlow's all-reduce of as many numbers takes two
                    workers that do nothing else: what is left when packing, casts and statistics cost nothing
  bare sockets      in step, and after each step the time that a socket takes to carry the bytes of bfloat16 both ways,
                    half of them and then the others, as every all-reduce of two must: what is left when messages
                    and sums cost nothing either
Efficiencies are medians over the rounds. Needs two free cores and 16 GB. Prints one JSON object.
"""
import argparse
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from train_step import ROOT, ask, rates_in_turns, run, serve, start

CASES = {'224 px, batch 32 a worker': (224, 32, 2), '128 px, batch 16 a worker': (128, 16, 5)}
DTYPES, SOCKETS = ('float32', 'bfloat16'), 'bare sockets'
NUM_PARAMETERS, COLLECTIVES = 5_183_016, 10  # of GhostNet 1.0; one after the other in a call


def start_workers(start_worker: Callable[..., subprocess.Popen], cores: list[int]) -> list[subprocess.Popen]:
    """The processes of one run."""
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in cores]
    addresses = [f'127.0.0.1:{each.getsockname()[1]}' for each in sockets]
    for each in sockets:
        each.close()
    return [start_worker(str(core), TF_CONFIG=json.dumps(
        {'cluster': {'worker': addresses}, 'task': {'type': 'worker', 'index': i}})) for i, core in enumerate(cores)]


def make_all_reduce(dtype: str) -> Callable[[int], float]:
    """measure(num_steps): seconds that the sum of all parameters over the workers takes, in one collective."""
    sys.path.insert(0, str(ROOT))
    from trainer.main import import_tensorflow
    import_tensorflow()
    import tensorflow as tf

    from trainer.strategy import build_strategy

    strategy = build_strategy('multi_worker')

    def replica_fn():
        tensor = tf.zeros([NUM_PARAMETERS // 128, 128], dtype)
        for _ in range(COLLECTIVES):
            tensor = tf.distribute.get_replica_context().all_reduce('SUM', tensor)
        return tensor[0, 0]

    all_reduce = tf.function(lambda: strategy.run(replica_fn), autograph=False)

    def measure(num_steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(num_steps):
            float(all_reduce())
        return (time.perf_counter() - begin) / (num_steps * COLLECTIVES)

    measure(2)
    return measure


def make_exchange() -> Callable[[int], float]:
    """measure(num_steps): seconds in which two processes give each other as many bytes as all parameters have."""
    cluster = json.loads(os.environ['TF_CONFIG'])
    host, port = cluster['cluster']['worker'][0].split(':')
    if cluster['task']['index'] == 0:
        with socket.create_server((host, int(port))) as server:
            peer, _ = server.accept()
    else:
        while True:
            try:
                peer = socket.create_connection((host, int(port)))
                break
            except ConnectionRefusedError:  # the other one is not there yet
                time.sleep(0.1)
    half = NUM_PARAMETERS  # bytes, of two for each
    sent, received = bytes(half), memoryview(bytearray(half))

    def measure(num_steps: int) -> float:
        begin = time.perf_counter()
        with ThreadPoolExecutor(1) as sender:
            for _ in range(2 * COLLECTIVES * num_steps):
                sending, at = sender.submit(peer.sendall, sent), 0
                while at < half:
                    at += peer.recv_into(received[at:])
                sending.result()
        return (time.perf_counter() - begin) / (num_steps * COLLECTIVES)

    return measure


def start_sending(what: str, core: str, **variables: str) -> subprocess.Popen:
    """A process with `make_all_reduce(what)` or `make_exchange()` on this core."""
    return run(['taskset', '-c', core, sys.executable, __file__, f'--send={what}'], **variables)


def measure(image_size: int, rows: int, num_steps: int, cores: list[int], rounds: int) -> dict[str, list[float]]:
    """Images a second over both cores, of each way and round."""
    one = {'name': 'one_device', 'image_size': image_size, 'global_batch_size': rows}
    apart = [start(one, str(core)) for core in cores]
    two = {'name': 'multi_worker', 'image_size': image_size, 'global_batch_size': rows * len(cores)}
    talking = {dtype: start_workers(functools.partial(start, two | {'all_reduce_dtype': dtype}), cores)
               for dtype in DTYPES}
    sending = {what: start_workers(functools.partial(start_sending, what), cores) for what in (*DTYPES, SOCKETS)}

    def in_step(then=()):
        begin = time.perf_counter()
        for _ in range(num_steps):
            ask(apart, 1)
        secs = time.perf_counter() - begin + num_steps * max(ask(then, num_steps), default=0)
        return num_steps * rows * len(apart) / secs

    return rates_in_turns([*apart, *(p for each in (talking, sending) for ps in each.values() for p in ps)], {
        'alone': lambda: sum(ask([process], num_steps)[0] for process in apart),
        'apart': lambda: sum(ask(apart, num_steps)),
        'apart, in step': in_step,
        'float32': lambda: min(ask(talking['float32'], num_steps)),  # each gives the rate of both
        'bfloat16': lambda: min(ask(talking['bfloat16'], num_steps)),
        'float32 at best': lambda: in_step(sending['float32']),
        'bfloat16 at best': lambda: in_step(sending['bfloat16']), SOCKETS: lambda: in_step(sending[SOCKETS])}, rounds)


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--case', choices=CASES, action='append', help='all by default')
    parser.add_argument('--send', choices=(*DTYPES, SOCKETS), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.send:
        serve(make_exchange() if flags.send == SOCKETS else make_all_reduce(flags.send))
        return
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
