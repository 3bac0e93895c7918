"""Where checkpoints go, and gin files."""

import pytest


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
