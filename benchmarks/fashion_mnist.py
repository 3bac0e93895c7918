"""gin/fashion_mnist.gin beside the reference's recipe in PyTorch, in turns on the same cores: time and accuracy.

    python benchmarks/fashion_mnist.py --other_python=torch-env/bin/python

Runs `fashion_mnist_timm.py` (which says how the other environment is made) and trainer.main from the start of their
processes to the end, each stopped while the other one runs, so that a machine that is shared slows both alike. What
they measure of themselves counts the time in which they are stopped and says nothing. Prints one JSON object: seconds
of each, its own turns alone, and what it reached.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_in_turns(commands: dict[str, list[str]], turn_secs: float) -> dict[str, tuple[float, str]]:
    """Seconds and standard output of each command; exits if one fails."""
    secs, results, running = dict.fromkeys(commands, 0.0), {}, {}
    try:
        while len(results) < len(commands):
            for name in [name for name in commands if name not in results]:
                start = time.perf_counter()
                if name in running:
                    os.killpg(running[name].pid, signal.SIGCONT)
                else:
                    running[name] = subprocess.Popen(commands[name], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                                     start_new_session=True)
                try:
                    stdout, _ = running[name].communicate(timeout=turn_secs)
                except subprocess.TimeoutExpired:
                    os.killpg(running[name].pid, signal.SIGSTOP)
                else:
                    results[name] = stdout
                    if running[name].returncode:
                        sys.exit(f'{name} ended with exit code {running[name].returncode}')
                secs[name] += time.perf_counter() - start
    finally:
        for name in running.keys() - results.keys():
            os.killpg(running[name].pid, signal.SIGKILL)
    return {name: (secs[name], results[name]) for name in commands}


def main() -> None:
    """Reads the flags, runs both, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--other_python', required=True, help='the Python that has torch and timm')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--turn_secs', type=float, default=30.0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(scratch, 'workdir')
        ran = run_in_turns({
            'reference': [flags.other_python, 'benchmarks/fashion_mnist_timm.py', f'--seed={flags.seed}'],
            'shipped': [sys.executable, '-m', 'trainer.main', '--gin_file=gin/fashion_mnist.gin',
                        f'--workdir={workdir}', f'--gin_param=train.seed={flags.seed}']}, flags.turn_secs)
        reports = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    secs = {name: round(each) for name, (each, _) in ran.items()}
    print(json.dumps({
        'seed': flags.seed, 'turn_secs': flags.turn_secs, 'seconds': secs,
        'shipped / reference': round(secs['shipped'] / secs['reference'], 3),
        'top1': {'reference': json.loads(ran['reference'][1].splitlines()[-1])['top1'],
                 'shipped': next(r['eval/top1'] for r in reversed(reports) if 'eval/top1' in r)}}))


if __name__ == '__main__':
    main()
