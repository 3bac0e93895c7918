"""The command in this process, and a finished run of it."""

import logging
import sys

import few_blocks
import pytest
from absl import flags

from trainer.main import main


@pytest.fixture
def command(capsys, monkeypatch):
    """command(*flags) -> (exit code, stdout, stderr) of few_blocks.py, in this process."""
    monkeypatch.setattr('ghostnet.model.BLOCKS', few_blocks.few_blocks())
    root, absl = logging.getLogger(), logging.getLogger('absl')
    handlers, levels = root.handlers[:], (root.level, absl.level)

    def run(*arguments):
        flags.FLAGS.unparse_flags()  # or flags that repeat would add to those of the last call
        capsys.readouterr()
        code = main(['trainer.main', *map(str, arguments)])
        return code, *capsys.readouterr()

    yield run
    root.handlers[:] = handlers  # main logs to what stderr is at the time
    root.setLevel(levels[0])
    absl.setLevel(levels[1])
    flags.FLAGS.unparse_flags()


@pytest.fixture(scope='session')
def trained(tmp_path_factory, folder, recipe, run):
    """The workdir of a finished run of six steps, one epoch and an evaluation, only to be read."""
    workdir = tmp_path_factory.mktemp('trained')
    finished = run(f'--gin_file={recipe}', f'--data_dir={folder}', f'--workdir={workdir}',
                   '--gin_param=train.max_steps=6', command=[sys.executable, few_blocks.__file__])
    assert finished.returncode == 0, finished.stderr
    return workdir
