"""The images of input_pipeline.py, and its contestants of another Python environment: DALI, torchvision, simplejpeg.

Imports nothing of this project. Run by input_pipeline.py; the environment (6 GB, beside the one of launch/):
    python3 -m venv torch-env
    torch-env/bin/pip install torch==2.14.1 torchvision==0.29.1 pillow==13.0.0 simplejpeg==1.9.0 \
        nvidia-dali-cuda120==2.4.0 scikit-learn==1.9.1 scikit-image==0.26.0 timm==1.0.31

The images: windows of the eight colour photographs that scikit-learn and scikit-image bring (china, flower; astronaut,
chelsea, coffee, rocket, both views of the motorcycle), half to all of their area, scaled to 500x375 pixels, with grain
(a standard deviation of 4 grey levels) in place of the detail that scaling loses, as JPEGs of quality 95, 4:2:0. They
have 65 to 115 KB, 89 on the average. Photographs on which to learn something they are not.
"""
import argparse
import importlib.metadata
import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from turns import serve

BATCH = 128
NUM_CORES = len(os.sched_getaffinity(0))
NUM_IMAGES, WIDTH, HEIGHT = 2000, 500, 375
GRAIN, JPEG_QUALITY = 4, 95
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def make_images(folder: Path) -> None:
    """Writes NUM_IMAGES JPEGs to folder/<class>/, a class for each photograph."""
    import skimage.data
    import sklearn.datasets
    from PIL import Image

    arrays = [*sklearn.datasets.load_sample_images().images, skimage.data.astronaut(), skimage.data.chelsea(),
              skimage.data.coffee(), skimage.data.rocket(), *skimage.data.stereo_motorcycle()[:2]]
    photographs = [Image.fromarray(array) for array in arrays]
    rng = np.random.default_rng(0)
    partial = folder.with_name(folder.name + '.partial')
    for label in range(len(photographs)):
        (partial / f'class{label}').mkdir(parents=True, exist_ok=True)
    for number, (label, photograph) in zip(range(NUM_IMAGES), itertools.cycle(enumerate(photographs))):
        scale = min(photograph.width / WIDTH, photograph.height / HEIGHT) * rng.uniform(0.5, 1) ** 0.5
        width, height = scale * WIDTH, scale * HEIGHT
        left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
        window = photograph.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        grainy = np.asarray(window) + rng.normal(0, GRAIN, (HEIGHT, WIDTH, 3))
        image = Image.fromarray(np.uint8(np.clip(grainy + 0.5, 0, 255)))
        image.save(partial / f'class{label}' / f'{number:06d}.JPEG', quality=JPEG_QUALITY)
    partial.rename(folder)


def dali(folder: Path, image_size: int, *, as_documented: bool = False) -> Iterator[np.ndarray]:
    """DALI on the CPU, a thread a core.

    Told not to antialias, to take the fast inverse DCT and to mirror within the resize (a negative width), each of
    which makes it faster. `as_documented`: its defaults instead (antialiased, exact), and fn.flip.
    """
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=NUM_CORES, device_id=None, seed=0)
    def pipeline():
        encoded, labels = fn.readers.file(file_root=str(folder), random_shuffle=True, initial_fill=1000)
        mirror = fn.random.coin_flip(probability=0.5)
        images = fn.decoders.image_random_crop(encoded, device='cpu', random_area=list(SCALE),
                                               random_aspect_ratio=list(RATIO), use_fast_idct=not as_documented)
        if as_documented:
            images = fn.flip(fn.resize(images, resize_x=image_size, resize_y=image_size), horizontal=mirror)
        else:
            width = fn.cast(image_size * (1 - 2 * mirror), dtype=types.FLOAT)
            images = fn.resize(images, resize_x=width, resize_y=float(image_size), antialias=False)
        return images, labels

    built = pipeline()
    built.build()
    while True:
        images, _ = built.run()
        yield np.asarray(images.as_tensor())  # a view: nothing is copied


def torchvision(folder: Path, image_size: int, *, decoder: str, antialias: bool = True,
                augment: bool = False) -> Iterator:
    """A DataLoader over ImageFolder with a process a core; uint8 [B, 3, H, W].

    decoder 'torchvision': to tensors, transforms v2. 'PIL': ImageFolder's own loader, transforms v1. `augment`: by
    torchvision's RandAugment there, by timm's here.
    """
    import torch
    import torchvision
    from torchvision.transforms import InterpolationMode, v2

    transforms = v2 if decoder == 'torchvision' else torchvision.transforms
    steps = [transforms.RandomResizedCrop(image_size, SCALE, RATIO, InterpolationMode.BILINEAR, antialias=antialias),
             transforms.RandomHorizontalFlip()]
    if augment and decoder == 'torchvision':
        steps += [v2.RandAugment(num_ops=2, magnitude=9)]
    elif augment:
        from timm.data.auto_augment import rand_augment_transform

        steps += [rand_augment_transform('rand-m9-mstd0.5', {'img_mean': (124, 116, 104)})]
    steps += [transforms.PILToTensor()] if decoder == 'PIL' else []

    def decode(path):
        return torchvision.io.decode_image(path, torchvision.io.ImageReadMode.RGB)

    loader = decode if decoder == 'torchvision' else torchvision.datasets.folder.default_loader
    dataset = torchvision.datasets.ImageFolder(folder, transforms.Compose(steps), loader=loader)
    # Shuffled without end: with so few images an epoch, starting each anew would cost more than in earnest.
    sampler = torch.utils.data.RandomSampler(dataset, num_samples=10**9 // len(dataset) * len(dataset))
    for images, _ in torch.utils.data.DataLoader(dataset, BATCH, sampler=sampler, num_workers=NUM_CORES):
        yield images.numpy()


def simplejpeg_decode(folder: Path, image_size: int) -> Iterator[np.ndarray]:
    """Bare decoding of whole images from memory, a thread a core, each into one buffer; yields the top left pixels."""
    import simplejpeg

    encoded = [path.read_bytes() for path in sorted(folder.rglob('*.JPEG'))]
    chunk = 32

    def decode(number):
        buffer = bytearray(4 * WIDTH * HEIGHT)
        chosen = [encoded[i % len(encoded)] for i in range(number * chunk, (number + 1) * chunk)]
        return np.stack([simplejpeg.decode_jpeg(each, 'RGB', buffer=buffer)[0, 0].copy() for each in chosen])

    with ThreadPoolExecutor(NUM_CORES) as threads:
        waiting = deque(threads.submit(decode, number) for number in range(2 * NUM_CORES))
        for number in itertools.count(2 * NUM_CORES):
            waiting.append(threads.submit(decode, number))
            yield waiting.popleft().result()


# name -> (what makes its batches, its own settings)
OTHER_CONTESTANTS = {
    'DALI': (dali, {}),
    'DALI, its defaults': (dali, {'as_documented': True}),
    'torchvision v2': (torchvision, {'decoder': 'torchvision'}),
    'torchvision v2, not antialiased': (torchvision, {'decoder': 'torchvision', 'antialias': False}),
    'torchvision v1, PIL': (torchvision, {'decoder': 'PIL'}),
    'bare decoding, simplejpeg': (simplejpeg_decode, {}),
}
OTHER_AUGMENTED = {
    'torchvision v2, RandAugment': (torchvision, {'decoder': 'torchvision', 'augment': True}),
    'torchvision v2, not antialiased, RandAugment': (torchvision, {'decoder': 'torchvision', 'antialias': False,
                                                                   'augment': True}),
    "torchvision v1, PIL, timm's RandAugment": (torchvision, {'decoder': 'PIL', 'augment': True}),
}


def main() -> None:
    """Makes the images, or serves as one contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--make_images', type=Path, metavar='FOLDER')
    parser.add_argument('--contestant', help='run by input_pipeline.py')
    parser.add_argument('--data_dir', type=Path)
    parser.add_argument('--image_size', type=int, default=224)
    flags = parser.parse_args()
    if flags.make_images:
        make_images(flags.make_images)
        return
    make, settings = (OTHER_CONTESTANTS | OTHER_AUGMENTED)[flags.contestant]
    packages = {dali: ['nvidia-dali-cuda120'], torchvision: ['torch', 'torchvision', 'pillow'],
                simplejpeg_decode: ['simplejpeg']}[make] + (['timm'] if settings.get('augment') else [])
    serve(make(flags.data_dir / 'folder' / 'train', flags.image_size, **settings),
          versions={name: importlib.metadata.version(name) for name in packages})


if __name__ == '__main__':
    main()
