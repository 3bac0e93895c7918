"""train_step.py's contestant of PyTorch: timm's ghostnet_100 and SGD on random images, on all cores, without input.

For each number of steps that it reads, it prints images a second. Imports nothing of this project.
"""
import argparse
import json
import os
import sys
import time

import timm
import torch


def main() -> None:
    """Reads the flags, warms up, serves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--image_size', type=int, required=True)
    parser.add_argument('--global_batch_size', type=int, required=True)
    flags = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = timm.create_model('ghostnet_100').train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=4e-5)
    images = torch.randn(flags.global_batch_size, 3, flags.image_size, flags.image_size)
    labels = torch.randint(0, 1000, (flags.global_batch_size,))

    def measure(num_steps: int) -> float:
        start = time.perf_counter()
        for _ in range(num_steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
            optimizer.step()
        return num_steps * flags.global_batch_size / (time.perf_counter() - start)

    measure(2)
    print(json.dumps('ready'), flush=True)
    for line in sys.stdin:
        print(measure(int(line)), flush=True)


if __name__ == '__main__':
    main()
