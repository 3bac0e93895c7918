"""What a source of examples is, and the error that says why there is none."""
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np


class DataError(Exception):
    """Data that are missing or are not what they should be; the message is one line and says what would be right."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to the encoded images and labels of one split."""

    name: str  # what was opened, for messages
    size: int  # number of examples
    class_names: Sequence[str]  # of the labels 0..num_classes-1
    # int64 [n] indices -> (n encoded images, which may be read as they are taken, so that a decoder finds them in the
    # processor's cache, int32 [n] labels). Any number of threads may call it at once.
    read: Callable[[np.ndarray], tuple[Iterable[bytes], np.ndarray]]
    where: Callable[[int], str]  # index -> file and record of that example, for messages
    # index -> why that example cannot be used whatever its image is, or ''. Its image is read as b''.
    problem: Callable[[int], str] = lambda index: ''

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        if not 0 <= index < self.size:
            raise IndexError(f'{self.name} has examples 0..{self.size - 1}, not {index}')
        encoded, labels = self.read(np.array([index], np.int64))
        return next(iter(encoded)), int(labels[0])

    def cached(self) -> 'Source':
        """The same, but images stay in memory once read: in time the whole split (ImageNet: 148 GB) in each process."""
        images, labels = {}, np.zeros(self.size, np.int32)

        def read(indices):
            if new := [i for i in np.unique(indices).tolist() if i not in images]:
                encoded, labels[new] = self.read(np.array(new))
                images.update(zip(new, encoded))  # of two threads that want the same one at once either may be first
            return [images[i] for i in indices.tolist()], labels[indices]

        return dataclasses.replace(self, read=read)
