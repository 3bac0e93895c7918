"""launch/tpu_worker.sh, on a machine without a TPU: what is installed, what the trainer finds, how it is stopped."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = ['--gin_file=gin/a b.gin', "--gin_param=data.name = 'x'", '*']


@pytest.fixture
def vm(checkout):
    (checkout.root / 'setup.py').write_text((ROOT / 'setup.py').read_text())
    checkout.recorded('sudo', '')
    return checkout


def test_a_vm_gets_its_own_tensorflow(vm):
    assert vm.run('launch/tpu_worker.sh', 'install').returncode == 0
    first, second = vm.log.read_text().splitlines()
    assert ' tensorflow-tpu==2.20.* ' in first
    assert ' keras>=' in first and ' tensorflow-datasets>=' in first and ' tensorboard>=' in first
    assert 'tensorflow>=' not in first
    assert second.endswith(f'--no-deps --editable {vm.root}')
    assert vm.run('launch/tpu_worker.sh', 'install').stderr == ''
    assert len(vm.installed()) == 2
    assert vm.calls() == []


def test_a_failed_installation_on_a_vm_is_no_installation(vm):
    vm.python(pip='exit 1')
    assert vm.run('launch/tpu_worker.sh', 'install').returncode == 1
    vm.python()
    assert vm.run('launch/tpu_worker.sh', 'install').returncode == 0
    assert len(vm.installed()) == 3


def test_a_vm_with_an_old_python_gets_another(vm):
    vm.python(version='3.10')
    vm.python('python3.11.fake', version='3.11')
    vm.recorded('sudo', f'[[ $* != *install*python3.11 ]] || cp {vm.bin}/python3.11.fake {vm.bin}/python3.11')
    assert vm.run('launch/tpu_worker.sh', 'install').returncode == 0
    assert [call[1:3] for call in vm.calls()] == [['apt-get', 'update'], ['apt-get', 'install']]


def test_a_vm_without_venv_gets_it(vm):
    vm.python(ensurepip_status=1)
    vm.run('launch/tpu_worker.sh', 'install')
    assert vm.calls() == [['sudo', 'apt-get', 'install', '--quiet', '--yes', 'python3-venv']]


def test_the_trainer_finds_the_tpu_before_python_starts(vm):
    env = 'PJRT_DEVICE NEXT_PLUGGABLE_DEVICE_USE_C_API TF_PLUGGABLE_DEVICE_LIBRARY_PATH'.split()
    prints = '; '.join(f'echo "${name}"' for name in env)
    vm.trainer(other=f'{prints}; printf "%s\\n" "$@"; exit 75')
    python = vm.bin / 'python3'
    libtpu = '*"import libtpu"*) echo /a/libtpu.so ;;'
    python.write_text(python.read_text().replace('case "$*" in', f'case "$*" in {libtpu}'))
    result = vm.run('launch/tpu_worker.sh', 'run', *FLAGS)
    assert result.returncode == 75, result.stderr
    assert result.stdout.splitlines() == ['TPU', 'true', '/a/libtpu.so', *FLAGS]


def start_trainer(vm):
    log = vm.directory / 'trainers'
    vm.trainer(w_1=f"trap 'trap \"exit 143\" TERM; sleep 2; : > {log}/saved; exit 42' TERM; : > {log}/ready; "
                   'while :; do sleep 0.02; done',
               other=f'[ ! -e {log}/saved ] || exit 0; exit 1')
    process = vm.start('launch/tpu_worker.sh', 'run')
    vm.wait(process, log / 'ready')
    return process


def test_stop_lets_the_trainer_save(vm):
    process = start_trainer(vm)
    assert vm.run('launch/tpu_worker.sh', 'stop').returncode == 0
    process.communicate(timeout=30)
    assert process.returncode == 42


def test_a_trainer_left_behind_is_stopped_before_another_starts(vm):
    left_behind = start_trainer(vm)
    second = vm.run('launch/tpu_worker.sh', 'run')
    assert second.returncode == 0, second.stderr
    assert 'stopping' in second.stderr
    left_behind.communicate(timeout=30)
    assert left_behind.returncode == 42


def test_stop_harms_no_other_process(vm):
    vm.run('launch/tpu_worker.sh', 'install')
    with subprocess.Popen(['sleep', '60']) as other:
        vm.write(vm.venv / '.trainer.pid', str(other.pid))
        assert vm.run('launch/tpu_worker.sh', 'stop').returncode == 0
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize('flags', [(), ('restart',)])
def test_the_worker_script_names_its_actions(vm, flags):
    vm.assert_refused(vm.run('launch/tpu_worker.sh', *flags), 'install, run and stop')
