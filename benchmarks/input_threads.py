"""How many images a second Python's lock lets input_pipeline's threads serve, if there are cores enough to decode them.

    python benchmarks/input_threads.py --threads=2,4,8,16,32,64

Threads that decode hold no lock; what they do between two calls of a decoder they do one at a time, whatever the number
of cores. Here decoding is --decode_ms of sleep, resizing the same calls on 4 x 4 pixels, all else is as it is: order,
reading, windows, random numbers, times, batches of 512. So two cores show what many would be held up by, as far as they
do it in time themselves ('cores_used'). The records are those of input_pipeline.py, which makes them.

Prints a JSON object for each number of threads, each measured in a process of its own: the median of --repeats.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

from turns import images_per_sec

BATCH = 512


def measure(shard_dir: Path, num_threads: int, decode_ms: float, repeats: int, secs: float) -> dict[str, float]:
    """The rate of so many threads; the process must not have imported input_pipeline before."""
    os.sched_getaffinity = lambda _: range(num_threads)  # where input_pipeline looks for the number of cores
    import cv2
    import numpy as np

    import input_pipeline
    from input_pipeline import preprocess

    decoded, small = np.zeros([375, 500, 3], np.uint8), np.zeros([4, 4, 3], np.uint8)

    def decode_jpeg(*_, **__):
        time.sleep(decode_ms / 1000)
        return decoded

    source = input_pipeline.open_source('tfrecord', str(shard_dir), 'train')
    preprocess.simplejpeg = types.SimpleNamespace(decode_jpeg=decode_jpeg)
    preprocess.cv2 = types.SimpleNamespace(
        ipp=cv2.ipp, INTER_AREA=cv2.INTER_AREA, INTER_LINEAR=cv2.INTER_LINEAR, COLOR_RGB2RGBA=cv2.COLOR_RGB2RGBA,
        COLOR_RGBA2RGB=cv2.COLOR_RGBA2RGB, cvtColor=lambda *_: cv2.cvtColor(small, cv2.COLOR_RGB2RGBA),
        resize=lambda *_, **__: cv2.resize(small, (4, 4)))
    dataset = input_pipeline.train_dataset(source, global_batch_size=BATCH, image_size=224)
    batches, rates, used = (batch['image'] for batch in dataset), [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        rates.append(images_per_sec(batches, secs))
        used.append((time.process_time() - cpu_start) / (time.perf_counter() - start))
    return {'threads': num_threads, 'images_per_sec': round(statistics.median(rates)), 'min': round(min(rates)),
            'max': round(max(rates)), 'cores_used': round(statistics.median(used), 2),
            'if_nothing_held_them_up': round(1000 * num_threads / decode_ms)}


def main() -> None:
    """Measures each number of threads in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', type=Path, default=Path(tempfile.gettempdir()) / 'input_pipeline')
    parser.add_argument('--threads', default='2,4,8,16,32,64')
    parser.add_argument('--decode_ms', type=float, default=1.7, help='what an image takes a core')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--secs', type=float, default=4.0, help='of a measurement')
    flags = parser.parse_args()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if not (flags.data_dir / 'tfrecord').is_dir():
        parser.error(f'no directory {flags.data_dir / "tfrecord"}: run input_pipeline.py first')
    if ',' not in flags.threads:
        print(json.dumps(measure(flags.data_dir / 'tfrecord', int(flags.threads), flags.decode_ms, flags.repeats,
                                 flags.secs)))
        return
    for number in flags.threads.split(','):
        subprocess.run([sys.executable, __file__, f'--data_dir={flags.data_dir}', f'--threads={number}',
                        f'--decode_ms={flags.decode_ms}', f'--repeats={flags.repeats}', f'--secs={flags.secs}'],
                       check=True)


if __name__ == '__main__':
    main()
