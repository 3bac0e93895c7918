"""Contestants that take turns on the same cores: each a process of its own, stopped while another one is measured.

A contestant's program calls `serve`, whoever compares them `take_turns`. The programs may run in different Python
environments: this file needs NumPy alone.
"""
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WARM_UP_BATCHES = 20
# Before a measurement, to use up what was read ahead; after it, to read ahead again before the process is stopped: an
# operation that is stopped half-way looks slow to tf.data's AUTOTUNE.
DISCARD_SECS = 1.0
SETTLE_SECS = 1.0


def serve(batches: Iterator, **about: object) -> None:
    """The contestant's side: warms up, says so, then measures whenever it is told to, until standard input ends.

    `batches` are endless, arrays or tensors [rows, ...] in host memory. Prints one JSON object `about` the contestant
    with shape, type and mean of its first batches, and another one for each measurement.
    """
    warm_up = [next(batches) for _ in range(2)]
    about |= {'shape': list(warm_up[0].shape), 'dtype': warm_up[0].dtype.name,
              'mean': round(float(np.mean([np.mean(batch) for batch in warm_up])), 2)}
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps({'images_per_sec': round(images_per_sec(batches, float(line)), 1)}), flush=True)


def images_per_sec(batches: Iterator, secs: float) -> float:
    """The rate over whole batches that take at least `secs`, after DISCARD_SECS."""
    start = time.perf_counter()
    while time.perf_counter() - start < DISCARD_SECS:
        next(batches)
    start, num_images, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < secs:
        num_images += next(batches).shape[0]
        elapsed = time.perf_counter() - start
    return num_images / elapsed


def take_turns(commands: dict[str, list[str]], rounds: int, secs: float) -> Iterator[dict]:
    """Starts all contestants, then measures each once a round, in another order each round.

    Yields what each one says of itself, then its measurements, with `contestant`, `round`, `cores_used` (the processor
    time of its processes by the clock's) and `cores_taken` (likewise by all else on the machine, and by its hosts).
    Exits if a contestant ends.
    """
    order = random.Random(0)
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, command in commands.items():
            processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                               start_new_session=True)
            stack.callback(os.killpg, processes[name].pid, signal.SIGKILL)
            yield {'contestant': name} | answer(processes[name], name)
            stop(processes[name])
        for number in range(rounds):
            for name in order.sample(list(processes), len(processes)):
                process = processes[name]
                os.killpg(process.pid, signal.SIGCONT)
                before = np.array([time.perf_counter(), cpu_seconds(process.pid), busy_seconds()])
                print(secs, file=process.stdin, flush=True)
                measured = answer(process, name)
                elapsed, used, busy = [time.perf_counter(), cpu_seconds(process.pid), busy_seconds()] - before
                yield {'contestant': name, 'round': number} | measured | {
                    'cores_used': round(used / elapsed, 2), 'cores_taken': round((busy - used) / elapsed, 2)}
                stop(process)


def answer(process: subprocess.Popen, name: str) -> dict:
    """The next line that a contestant prints."""
    line = process.stdout.readline()
    if not line:
        sys.exit(f'{name} ended with exit code {process.wait()}; its last words stand above')
    return json.loads(line)


def stop(process: subprocess.Popen) -> None:
    """Lets a contestant read ahead what it can, then stops all of its processes."""
    time.sleep(SETTLE_SECS)
    os.killpg(process.pid, signal.SIGSTOP)


def cpu_seconds(group: int) -> float:
    """Processor time, in seconds, that the living processes of a process group have used."""
    ticks = 0
    for path in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            fields = path.read_text().rpartition(')')[2].split()  # from field 3 on, see proc_pid_stat(5)
            ticks += int(fields[11]) + int(fields[12]) if int(fields[2]) == group else 0
    return ticks / os.sysconf('SC_CLK_TCK')


def busy_seconds() -> float:
    """Time, in seconds and summed over all cores, in which a core was not idle."""
    ticks = [int(field) for field in Path('/proc/stat').read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf('SC_CLK_TCK')  # less idle and iowait
