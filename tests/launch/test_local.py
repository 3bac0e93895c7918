"""The scripts for one machine: what they say when something is missing, what they install and when, what they pass on.

Each test runs the real scripts in a small checkout of their own, on a PATH that holds only a few tools (conftest.py),
with stubs for Python and for whatever else the test is about. Nothing is installed.
"""

import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A pip that "installs" linters which find nothing.
PIP_WITH_LINTERS = f'for tool in ruff shellcheck; do cp {shutil.which("true")} "${{0%/*}}/$tool"; done'

IN_TWO_PROCESSES = ['--numprocesses=2', '--dist=loadfile']
both_scripts = pytest.mark.parametrize('script', ['launch/local.sh', 'launch/test.sh'])


@both_scripts
@pytest.mark.parametrize('version', ['3.10', '3.14', '2.7', '3.9'])
def test_a_python_out_of_range_is_named(checkout, script, version):
    checkout.python(version=version)
    checkout.assert_refused(checkout.run(script), 'Python 3.11, 3.12 or 3.13', f'python3 is {version}')
    assert checkout.installed() == []


@both_scripts
def test_no_python_at_all(checkout, script):
    (checkout.bin / 'python3').unlink()
    checkout.assert_refused(checkout.run(script), 'Python 3.11, 3.12 or 3.13', 'python3 does not run')


@pytest.mark.parametrize('name', ['python3.13', 'python3.12', 'python3.11'])
def test_another_python_in_range_is_found(checkout, name):
    checkout.python(version='3.14')
    checkout.python(name, version=name.removeprefix('python'))
    assert checkout.run('launch/local.sh').returncode == 0


def test_a_name_on_the_path_that_does_not_run_is_passed_over(checkout):
    checkout.stub('python3', 'echo "no such version" >&2; exit 127')
    checkout.python('python3.11', version='3.11')
    assert checkout.run('launch/local.sh').returncode == 0


def test_PYTHON_decides(checkout):
    checkout.python('old', version='3.8')
    checkout.python('new', version='3.13')
    checkout.assert_refused(checkout.run('launch/local.sh', PYTHON='old'), 'old is 3.8')
    assert checkout.run('launch/local.sh', PYTHON='new').returncode == 0


@both_scripts
def test_a_python_without_venv(checkout, script):
    checkout.python(ensurepip_status=1)
    checkout.assert_refused(checkout.run(script), 'venv', 'python3-venv')
    assert checkout.installed() == []


@both_scripts
def test_little_disk(checkout, script):
    checkout.stub('df', f'echo header; echo /dev/disk 9999999 1 {4 * 2**20 - 1} 1% /')
    checkout.assert_refused(checkout.run(script), '4 GB', '4095 MB')
    assert checkout.installed() == []


def test_just_enough_disk(checkout):
    checkout.stub('df', f'echo header; echo /dev/disk 9999999 1 {4 * 2**20} 1% /')
    assert checkout.run('launch/local.sh').returncode == 0


def test_the_second_start_installs_nothing_and_needs_no_disk(checkout):
    assert checkout.run('launch/local.sh').returncode == 0
    assert checkout.installed() == [str(checkout.root)]
    checkout.stub('df', 'echo header; echo /dev/disk 1 1 1 100% /')
    second = checkout.run('launch/local.sh')
    assert (second.returncode, second.stderr) == (0, '')
    assert len(checkout.installed()) == 1


def test_new_requirements_are_installed(checkout):
    checkout.run('launch/local.sh')
    checkout.write(checkout.root / 'setup.py', 'other requirements')
    assert checkout.run('launch/local.sh').returncode == 0
    assert len(checkout.installed()) == 2


def test_a_moved_checkout_is_installed_again(checkout):
    checkout.run('launch/local.sh')
    moved = checkout.root.rename(checkout.root.parent / 'moved')
    checkout.root = moved
    assert checkout.run('launch/local.sh').returncode == 0
    assert checkout.installed()[1:] == [str(moved)]


def test_an_environment_whose_python_is_gone_is_made_again(checkout):
    checkout.python('python3.11', version='3.11')
    checkout.run('launch/local.sh', PYTHON=str(checkout.bin / 'python3.11'))
    (checkout.bin / 'python3.11').unlink()
    result = checkout.run('launch/local.sh')
    assert result.returncode == 0
    assert 'incomplete' in result.stderr
    assert len(checkout.installed()) == 2


def test_both_scripts_share_an_environment(checkout):
    checkout.run('launch/local.sh')
    checkout.run('launch/test.sh')
    checkout.run('launch/local.sh')
    assert checkout.installed() == [str(checkout.root), f'{checkout.root}[dev]']


def test_cuda_comes_where_nvidia_smi_answers(checkout):
    checkout.stub('nvidia-smi', 'echo "GPU 0: a GPU"')
    assert checkout.run('launch/local.sh').returncode == 0
    assert checkout.installed() == [f'{checkout.root}[cuda]']


def test_an_installed_cuda_stays(checkout):
    checkout.stub('nvidia-smi', 'echo "GPU 0: a GPU"')
    checkout.run('launch/local.sh')
    (checkout.bin / 'nvidia-smi').unlink()
    assert checkout.run('launch/local.sh').returncode == 0
    assert checkout.installed() == [f'{checkout.root}[cuda]']


def test_no_cuda_where_nvidia_smi_fails(checkout):
    checkout.stub('nvidia-smi', 'echo "no devices were found"; exit 6')
    assert checkout.run('launch/local.sh').returncode == 0
    assert checkout.installed() == [str(checkout.root)]


def test_an_installation_stopped_by_the_keyboard_is_made_again(checkout):
    checkout.python(pip='exec sleep 60')
    process = checkout.start('launch/local.sh')
    while not checkout.installed():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) != 0
    process.communicate()
    left_over = checkout.write(checkout.venv / 'lib/half_a_package.py', '')

    checkout.python()
    result = checkout.run('launch/local.sh')
    assert result.returncode == 0
    assert 'incomplete' in result.stderr
    assert len(checkout.installed()) == 2
    assert not left_over.exists()
    assert checkout.run('launch/local.sh').stderr == ''


def test_a_failed_installation_is_no_installation(checkout):
    checkout.python(pip='echo "no route to host" >&2; exit 1')
    result = checkout.run('launch/local.sh')
    assert result.returncode == 1
    assert result.stdout == ''
    assert 'no route to host' in result.stderr
    assert 'the same command tries again' in result.stderr
    checkout.python()
    assert checkout.run('launch/local.sh').returncode == 0


def test_two_starts_do_not_install_over_each_other(checkout):
    lock = checkout.write(checkout.venv / '.lock', '').open()
    fcntl.flock(lock, fcntl.LOCK_EX)
    process = checkout.start('launch/local.sh')
    assert 'waiting' in process.stderr.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    assert checkout.installed() == []
    lock.close()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(checkout.installed()) == 1


def test_the_lock_of_a_start_at_the_same_moment_is_no_file_of_somebody_else(checkout):
    checkout.venv.mkdir()
    # Whoever looks into the directory finds the lock that another start has made since it looked for one.
    checkout.stub('ls', f': > {checkout.venv}/.lock; echo .lock')
    assert checkout.run('launch/local.sh').returncode == 0


def test_a_directory_of_something_else_is_left_alone(checkout, tmp_path):
    precious = checkout.write(tmp_path / 'home/thesis.txt', 'years of work')
    checkout.assert_refused(checkout.run('launch/local.sh', VENV=str(precious.parent)), str(precious.parent), 'VENV')
    assert [path.name for path in precious.parent.iterdir()] == ['thesis.txt']


def test_VENV_is_relative_to_the_current_directory(checkout, tmp_path):
    checkout.python(pip=PIP_WITH_LINTERS)
    for script in ('launch/local.sh', 'launch/test.sh'):
        assert checkout.run(script, cwd=tmp_path, VENV='elsewhere').returncode == 0
    assert (tmp_path / 'elsewhere/pyvenv.cfg').exists()
    assert not checkout.venv.exists()
    assert not (checkout.root / 'elsewhere').exists()


def test_without_flags_the_quickstart_runs(checkout, tmp_path):
    result = checkout.run('launch/local.sh', cwd=tmp_path)
    assert result.stdout.splitlines() == ['-m', 'trainer.main', '--gin_file=gin/quickstart.gin']


def test_flags_go_on_beside_the_quickstart(checkout):
    flags = ['--workdir=a directory', "--gin_param=data.name = 'x'", '--mode=eval', '*']
    result = checkout.run('launch/local.sh', *flags)
    assert result.stdout.splitlines() == ['-m', 'trainer.main', '--gin_file=gin/quickstart.gin', *flags]


@pytest.mark.parametrize('form', ['--gin_file=a.gin', '-gin_file=a.gin', '--gin_file a.gin', '-gin_file a.gin'])
def test_a_recipe_takes_the_place_of_the_quickstart(checkout, form):
    flags = ['--workdir=w', *form.split()]
    assert checkout.run('launch/local.sh', *flags).stdout.splitlines() == ['-m', 'trainer.main', *flags]


@pytest.fixture
def linted(checkout):
    """A checkout whose linters are stubs that find nothing."""
    checkout.run('launch/local.sh')
    for linter in ('ruff', 'shellcheck'):
        checkout.write(checkout.venv / 'bin' / linter, '#!/bin/sh\n').chmod(0o755)
    return checkout


def test_test_sh_lints_counts_and_tests(linted):
    linted.write(linted.root / 'trainer/a.py', 'line\n' * 4999)
    result = linted.run('launch/test.sh', '-x', 'tests/a b.py')
    assert result.returncode == 0
    assert '4999 lines' in result.stdout
    assert result.stdout.splitlines()[-6:] == ['-m', 'pytest', *IN_TWO_PROCESSES, '-x', 'tests/a b.py']


def test_test_sh_refuses_a_system_too_large_to_read(linted):
    linted.write(linted.root / 'ghostnet/a.py', 'line\n' * 5000)
    result = linted.run('launch/test.sh')
    assert result.returncode == 1
    assert '5000 lines' in result.stdout
    assert 'pytest' not in result.stdout


@pytest.mark.parametrize('linter', ['ruff', 'shellcheck'])
def test_test_sh_stops_at_what_a_linter_finds(linted, linter):
    linted.write(linted.venv / 'bin' / linter, '#!/bin/sh\nexit 1\n')
    result = linted.run('launch/test.sh')
    assert result.returncode == 1
    assert 'pytest' not in result.stdout


def test_ci_makes_a_fresh_environment_and_removes_it(checkout, tmp_path):
    checkout.python(pip=PIP_WITH_LINTERS)
    scratch = tmp_path / 'tmp'
    scratch.mkdir()
    result = checkout.run('.ci/run', '-x', cwd=tmp_path, TMPDIR=str(scratch), CI='true')
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-5:] == ['-m', 'pytest', *IN_TWO_PROCESSES, '-x']
    assert f'installing into {scratch}' in result.stderr
    assert list(scratch.iterdir()) == []
    assert not checkout.venv.exists()


def test_ci_fails_when_a_test_fails(checkout, tmp_path):
    checkout.python(pip=PIP_WITH_LINTERS, exit_status=1)
    assert checkout.run('.ci/run', TMPDIR=str(tmp_path)).returncode == 1


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which('shellcheck', path=f'{pathlib.Path(sys.executable).parent}:{os.environ.get("PATH", "")}')
    if not shellcheck:
        pytest.skip('shellcheck is not installed: launch/test.sh installs it')
    scripts = [*(ROOT / 'launch').glob('*.sh'), ROOT / 'launch/slurm.sbatch', ROOT / '.ci/run']
    result = subprocess.run([shellcheck, '--external-sources', *scripts], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout + result.stderr == ''


def test_the_scripts_can_be_run():
    names = 'local.sh multi_worker.sh slurm.sbatch test.sh tpu_vm.sh tpu_worker.sh ../.ci/run'.split()
    assert [name for name in names if not os.access(ROOT / 'launch' / name, os.X_OK)] == []


def test_launch_holds_no_hyper_parameter():
    for script in (path for path in (ROOT / 'launch').rglob('*') if path.is_file()):
        assert 'gin_param' not in script.read_text()
