"""The command starts itself anew, once, so that glibc takes memory in large pages; unless glibc was told something."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# What Python runs first of all, in each program that a process becomes.
NOTES_STARTS = """
import os
with open(os.environ['STARTS'], 'a') as file:
    print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), file=file)
"""


@pytest.fixture
def command(tmp_path):
    """command(*arguments, **variables): the process that has ended, what it printed, and its starts."""
    (tmp_path / 'sitecustomize.py').write_text(NOTES_STARTS)

    def run(*arguments, **variables):
        environment = {key: value for key, value in os.environ.items() if key != 'GLIBC_TUNABLES'}
        environment |= {'STARTS': str(tmp_path / 'starts'), 'PYTHONPATH': f'{tmp_path}:{REPOSITORY}'} | variables
        process = subprocess.Popen([sys.executable, '-m', 'trainer.main', *arguments], env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        stdout, stderr = process.communicate(timeout=120)
        return process, stdout, stderr, (tmp_path / 'starts').read_text().splitlines()

    return run


def test_it_stays_the_same_process(command):
    process, stdout, _, starts = command('--help')
    assert starts == [f'{process.pid} None', f'{process.pid} glibc.malloc.hugetlb=1']
    assert process.returncode == 0
    assert stdout.count('--gin_file') == 1


@pytest.mark.parametrize('told', ['', 'glibc.malloc.arena_max=2'])
def test_what_the_user_tells_glibc_counts(command, told):
    process, _, _, starts = command('--help', GLIBC_TUNABLES=told)
    assert starts == [f'{process.pid} {told}']


def test_arguments_and_exit_code_go_through(command):
    process, stdout, stderr, starts = command('--gin_flie=a "b" $HOME *', '')
    assert len(starts) == 2
    assert process.returncode == 2
    assert stdout == ''
    assert stderr.count('error: ') == 1
    assert 'gin_flie' in stderr
