"""Where checkpoints go, and gin files; parameters and gradients for the optimizers."""

import numpy as np
import pytest
from optimizer_harness import NUM_STEPS, SHAPES


@pytest.fixture
def directory(tmp_path):
    return tmp_path / 'run' / 'checkpoints'


@pytest.fixture
def write(tmp_path):
    """write(text, name) -> path of a gin file."""
    def write(text, name='x.gin'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}


@pytest.fixture
def grads():
    """One set of gradients a step."""
    rng = np.random.default_rng(1)
    return [{path: rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}
            for _ in range(NUM_STEPS)]
