"""The reference for gin/recipes/fashion_mnist_reference.gin: timm's ghostnet_100, trained by PyTorch on Fashion-MNIST.

Imports nothing of this project: it is the outside oracle for what the recipe reaches. The recipe is fixed: 56 px, batch
128, SGD 0.9 Nesterov, peak rate 0.1 after half an epoch of linear warmup, then cosine to 0, weight decay 4e-5 off batch
norm and biases, label smoothing 0.1, dropout 0.2, shift by up to 2 px and flip at 28 px, then bilinear to 56 px, grey
repeated to three channels, incomplete last training batches dropped. Every test image is counted once.

PyTorch needs an environment of its own (5.6 GB), beside the one that launch/ makes:
    python3 -m venv torch-env
    torch-env/bin/pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31
    torch-env/bin/python benchmarks/fashion_mnist_timm.py --seed=0
Data: the four idx.gz files, in Debian and Ubuntu from the package dataset-fashion-mnist.

Prints one JSON object an epoch and a last one for the run: test accuracy (0..1), training img/s, seconds since start.
Leave it the machine: PyTorch's threads wait for each other actively, and crawl when the cores are shared.
"""

import argparse
import gzip
import json
import math
import pathlib
import sys
import time

import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional as F

FILES = ('train-images-idx3', 'train-labels-idx1', 't10k-images-idx3', 't10k-labels-idx1')
IMAGE_SIZE = 56
GLOBAL_BATCH_SIZE = 128
PEAK_LEARNING_RATE = 0.1
WARMUP_EPOCHS = 0.5
WEIGHT_DECAY = 4e-5
LABEL_SMOOTHING = 0.1
MAX_SHIFT = 2
MEAN, STD = 0.286, 0.353


def read_idx(path: pathlib.Path) -> torch.Tensor:
    """Returns the array of an idx.gz file: bytes 0, 0, 8 (for uint8), number of dimensions; big-endian sizes; data."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b'\x00\x00\x08':
        sys.exit(f'{path}: not an idx file of bytes, it begins with {raw[:4].hex()}')
    num_dims = raw[3]
    sizes = np.frombuffer(raw, '>i4', num_dims, offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * num_dims).reshape(sizes).copy())


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifts each uint8 image [B, H, W] by up to MAX_SHIFT pixels each way over black, and flips half of them."""
    num_images, height, width = images.shape
    padded = F.pad(images, [MAX_SHIFT] * 4)
    top, left = torch.randint(0, 2 * MAX_SHIFT + 1, (2, num_images, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    flip = torch.rand(num_images, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(num_images)[:, None, None], rows[:, :, None], columns[:, None, :]]


def to_network_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 28, 28] -> normalised float32 [B, 3, IMAGE_SIZE, IMAGE_SIZE]."""
    normalised = (images[:, None].float() / 255 - MEAN) / STD
    resized = F.interpolate(normalised, size=IMAGE_SIZE, mode='bilinear', align_corners=False)
    return resized.expand(-1, 3, -1, -1).contiguous()


def learning_rate(step: int, steps_per_epoch: int, num_steps: int) -> float:
    """Linear to the peak over WARMUP_EPOCHS, then half a cosine that ends at 0 with the last step."""
    warmup_steps = WARMUP_EPOCHS * steps_per_epoch
    if step < warmup_steps:
        return PEAK_LEARNING_RATE * (step + 1) / warmup_steps
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps)))


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD that decays matrices and kernels, not the vectors: biases, gamma and beta."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{'params': kernels, 'weight_decay': WEIGHT_DECAY}, {'params': vectors, 'weight_decay': 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)


@torch.inference_mode()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the fraction of the images [N, 28, 28] that the model labels right."""
    model.eval()
    batches = zip(images.split(500), labels.split(500))
    num_correct = sum(int((model(to_network_input(x)).argmax(1) == y).sum()) for x, y in batches)
    return num_correct / len(images)


def run(data_dir: pathlib.Path, seed: int, num_epochs: int, limit_steps: int | None) -> None:
    """Trains, evaluates after every epoch, prints JSON lines."""
    start = time.perf_counter()
    files = [data_dir / f'{name}-ubyte.gz' for name in FILES]
    missing = ', '.join(file.name for file in files if not file.is_file())
    if missing:
        print(f'{data_dir} lacks {missing}: install dataset-fashion-mnist or give --data_dir', file=sys.stderr)
        sys.exit(2)
    train_images, train_labels, test_images, test_labels = map(read_idx, files)
    train_labels, test_labels = train_labels.long(), test_labels.long()

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model('ghostnet_100', num_classes=10)
    model.drop_rate = 0.2  # timm's default, said here because the recipe depends on it
    optimizer = build_optimizer(model)
    steps_per_epoch = len(train_images) // GLOBAL_BATCH_SIZE
    num_steps = num_epochs * steps_per_epoch
    last_step = min(num_steps, limit_steps or num_steps)

    step, train_secs, accuracies = 0, 0.0, []
    while step < last_step:
        model.train()
        epoch_start, epoch_steps, loss_sum = time.perf_counter(), min(steps_per_epoch, last_step - step), 0.0
        order = torch.randperm(len(train_images), generator=generator)[: epoch_steps * GLOBAL_BATCH_SIZE]
        for rows in order.split(GLOBAL_BATCH_SIZE):
            for group in optimizer.param_groups:
                group['lr'] = learning_rate(step, steps_per_epoch, num_steps)
            logits = model(to_network_input(augment(train_images[rows], generator)))
            loss = F.cross_entropy(logits, train_labels[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
            step += 1
        epoch_secs = time.perf_counter() - epoch_start
        train_secs += epoch_secs
        accuracies.append(evaluate(model, test_images, test_labels))
        report = {
            'epoch': len(accuracies),
            'step': step,
            'train_loss': round(loss_sum / epoch_steps, 4),
            'top1': accuracies[-1],
            'images_per_sec': round(epoch_steps * GLOBAL_BATCH_SIZE / epoch_secs, 1),
            'seconds': round(time.perf_counter() - start, 1),
        }
        print(json.dumps(report), flush=True)

    summary = {
        'model': 'timm ghostnet_100',
        'versions': {'torch': torch.__version__, 'timm': timm.__version__},
        'num_threads': torch.get_num_threads(),
        'seed': seed,
        'num_steps': step,
        'top1_by_epoch': accuracies,
        'top1': accuracies[-1],
        'images_per_sec': round(step * GLOBAL_BATCH_SIZE / train_secs, 1),
        'seconds': round(time.perf_counter() - start, 1),
    }
    print(json.dumps(summary))


def positive_int(text: str) -> int:
    """An argument type: a whole number of at least 1."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main() -> None:
    """Reads the flags and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', type=pathlib.Path, default='/usr/share/datasets/fashion-mnist')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs', type=positive_int, default=5)
    parser.add_argument('--limit_steps', type=positive_int, help='a trial: stop the full schedule after so many')
    flags = parser.parse_args()
    run(flags.data_dir, flags.seed, flags.epochs, flags.limit_steps)


if __name__ == '__main__':
    main()
