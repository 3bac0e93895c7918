"""train_step.py's contestant of PyTorch: timm's ghostnet_100 and SGD on random images, on all cores, without input.

Imports nothing of the packages.
"""
import argparse
import os
import time

import timm
import torch
from fashion_mnist_timm import LABEL_SMOOTHING, build_optimizer
from train_step import serve


def main() -> None:
    """Reads the flags, warms up, serves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--image_size', type=int, required=True)
    parser.add_argument('--global_batch_size', type=int, required=True)
    flags = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = timm.create_model('ghostnet_100').train()
    optimizer = build_optimizer(model)
    images = torch.randn(flags.global_batch_size, 3, flags.image_size, flags.image_size)
    labels = torch.randint(0, 1000, (flags.global_batch_size,))

    def measure(num_steps: int) -> float:
        start = time.perf_counter()
        for _ in range(num_steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=LABEL_SMOOTHING).backward()
            optimizer.step()
        return num_steps * flags.global_batch_size / (time.perf_counter() - start)

    measure(2)
    serve(measure)


if __name__ == '__main__':
    main()
