"""launch/tpu_vm.sh: what it asks of gcloud, a stub that records its calls and plays what happens to a VM."""

import os
import shlex
import signal
import subprocess

import pytest

WHERE = ('--name=net', '--zone=here-a')
WHAT = ('--accelerator_type=v5litepod-8', '--version=some-image')
TRAIN = ('train', *WHERE, *WHAT, '--pause_secs=0')
FLAGS = ['--gin_file=gin/a b.gin', "--gin_param=data.name = 'x'", '--gin_param=a="$HOME"', '*']

# Keeps the state of one VM in a file, absent or not, and takes what happens to each run from a list:
# "CODE" is the run's exit code, "CODE STATE" also leaves the VM in that state, "wait" runs until `stop` comes.
GCLOUD = """
cd {directory}
case "$4 $*" in
  describe*)
    [[ -f vm ]] || {{ echo 'ERROR: (gcloud) NOT_FOUND: Resource net was not found' >&2; exit 1; }}
    cat vm ;;
  create*) [[ ! -f no-capacity ]] || {{ echo 'ERROR: no capacity' >&2; exit 1; }}; echo READY > vm; echo created ;;
  delete*) rm vm ;;
  ssh*worker.sh\\ run*)
    runs=$(($(cat runs 2>/dev/null || echo 0) + 1)); echo "$runs" > runs
    what=$(sed -n "$runs"p plan)
    [[ $what != wait ]] || {{ : > waiting; while [[ ! -f stopped ]]; do sleep 0.02; done; what=42; }}
    [[ $what != *\\ * ]] || if [[ ${{what#* }} == gone ]]; then rm vm; else echo "${{what#* }}" > vm; fi
    echo result
    exit "${{what%% *}}" ;;
  ssh*worker.sh\\ stop*) : > stopped ;;
esac
"""


@pytest.fixture
def cloud(checkout):
    for path in ('pyproject.toml', 'README.md', 'gin/imagenet.gin'):
        checkout.write(checkout.root / path, '')
    checkout.recorded('gcloud', GCLOUD.format(directory=checkout.directory))
    return checkout


def plan(cloud, *runs: str, state: str | None = None) -> None:
    cloud.write(cloud.directory / 'plan', ''.join(f'{run}\n' for run in runs))
    if state:
        cloud.write(cloud.directory / 'vm', f'{state}\n')


def verbs(cloud) -> list[str]:
    """What gcloud was asked for, without the questions: create, scp, install, run, stop, delete."""
    found = []
    for call in cloud.calls():
        assert call[:4] == ['gcloud', 'compute', 'tpus', 'tpu-vm']
        assert '--zone=here-a' in call
        command = next((word for word in call if word.startswith('--command=')), '')
        names = [name for name in ('install', 'run', 'stop') if f'tpu_worker.sh {name}' in command]
        found += names or ([] if call[4] == 'describe' else [call[4]])
    return found


def test_from_nothing_to_a_result(cloud):
    plan(cloud, '0')
    result = cloud.run('launch/tpu_vm.sh', *TRAIN, '--spot', '--project=mine', '--', *FLAGS, '--workdir=/mnt/run')
    assert result.returncode == 0, result.stderr
    assert result.stdout == 'result\n'
    assert verbs(cloud) == ['create', 'scp', 'install', 'run']
    assert all('--project=mine' in call for call in cloud.calls())
    create = next(call for call in cloud.calls() if call[4] == 'create')
    assert {'net', '--accelerator-type=v5litepod-8', '--version=some-image', '--spot'} <= set(create)
    assert 'cost money' in result.stderr


def test_flags_survive_the_shell_on_the_vm(cloud):
    plan(cloud, '0', state='READY')
    assert cloud.run('launch/tpu_vm.sh', *TRAIN, '--', *FLAGS).returncode == 0
    run = cloud.calls()[-1]
    assert '--worker=all' in run
    command = run[-2].removeprefix('--command=')
    assert shlex.split(command) == [
        'cd', 'ghostnet-training', '&&', 'exec', './launch/tpu_worker.sh', 'run', *FLAGS]


def test_the_checkout_is_copied_without_runs_and_environments(cloud):
    cloud.write(cloud.root / 'runs/quickstart/metrics.jsonl', '')
    cloud.write(cloud.root / '.venv/pyvenv.cfg', '')
    cloud.write(cloud.root / 'trainer/__pycache__/a.pyc', '')
    kept = cloud.directory / 'archive.tar.gz'
    cloud.recorded('gcloud', f'case $4 in scp) cp "$5" {kept} ;; describe) echo READY ;; esac')
    assert cloud.run('launch/tpu_vm.sh', *TRAIN).returncode == 0
    listed = subprocess.run(['tar', '-tzf', kept], capture_output=True, text=True, check=True).stdout.split()
    assert {'setup.py', 'gin/imagenet.gin', 'launch/tpu_worker.sh', 'trainer/__init__.py'} <= set(listed)
    assert not any(word in name for name in listed for word in ('runs', '.venv', '__pycache__'))


@pytest.mark.parametrize('code', [42, 75])
def test_runs_again_after_42_and_75(cloud, code):
    plan(cloud, f'{code}', f'{code}', '0', state='READY')
    assert cloud.run('launch/tpu_vm.sh', *TRAIN).returncode == 0
    assert verbs(cloud) == ['scp', 'install', 'run', 'run', 'run']


@pytest.mark.parametrize('code', [1, 2, 139])
def test_stops_on_anything_else(cloud, code):
    plan(cloud, f'{code}', '0', state='READY')
    assert cloud.run('launch/tpu_vm.sh', *TRAIN).returncode == code
    assert verbs(cloud) == ['scp', 'install', 'run']


@pytest.mark.parametrize('end', ['255 PREEMPTED', '1 PREEMPTED', '42 PREEMPTED', '75 TERMINATED'])
def test_a_preempted_vm_is_made_again(cloud, end):
    plan(cloud, end, '0', state='READY')
    result = cloud.run('launch/tpu_vm.sh', *TRAIN)
    assert result.returncode == 0, result.stderr
    assert verbs(cloud) == ['scp', 'install', 'run', 'delete', 'create', 'scp', 'install', 'run']


def test_a_vm_that_vanished_is_made_again(cloud):
    plan(cloud, '255 gone', '0', state='READY')
    assert cloud.run('launch/tpu_vm.sh', *TRAIN).returncode == 0
    assert verbs(cloud) == ['scp', 'install', 'run', 'create', 'scp', 'install', 'run']


def test_a_lost_connection_is_made_again(cloud):
    plan(cloud, '255', '0', state='READY')
    assert cloud.run('launch/tpu_vm.sh', *TRAIN).returncode == 0
    assert verbs(cloud) == ['scp', 'install', 'run', 'run']


def test_restarts_in_a_row_end(cloud):
    plan(cloud, *['75'] * 9, state='READY')
    result = cloud.run('launch/tpu_vm.sh', *TRAIN, '--max_restarts=2')
    assert result.returncode == 75
    assert verbs(cloud).count('run') == 3


def test_no_capacity_at_first_ends_it(cloud):
    plan(cloud, '0')
    cloud.write(cloud.directory / 'no-capacity', '')
    result = cloud.run('launch/tpu_vm.sh', *TRAIN)
    assert result.returncode == 1
    assert 'no capacity' in result.stderr
    assert verbs(cloud) == ['create']


def test_no_capacity_after_a_preemption_is_tried_again(cloud):
    plan(cloud, '255 PREEMPTED', state='READY')
    cloud.write(cloud.directory / 'no-capacity', '')
    assert cloud.run('launch/tpu_vm.sh', *TRAIN, '--max_restarts=2').returncode == 75
    assert verbs(cloud) == ['scp', 'install', 'run', 'delete', 'create', 'create']


def test_an_error_that_is_not_absence_creates_nothing(cloud):
    cloud.recorded('gcloud', 'echo "ERROR: you are not logged in" >&2; exit 1')
    result = cloud.run('launch/tpu_vm.sh', *TRAIN)
    assert result.returncode == 1
    assert 'not logged in' in result.stderr
    assert len(cloud.calls()) == 1


@pytest.mark.parametrize('state', ['CREATING', 'STOPPED', 'REPAIRING'])
def test_a_vm_in_another_state_is_left_alone(cloud, state):
    plan(cloud, '0', state=state)
    result = cloud.run('launch/tpu_vm.sh', *TRAIN)
    assert result.returncode == 1
    assert f'net is {state}' in result.stderr
    assert verbs(cloud) == []


def test_setup_runs_before_the_installation(cloud):
    plan(cloud, '0')
    assert cloud.run('launch/tpu_vm.sh', *TRAIN, '--setup=mount it', '--worker=0').returncode == 0
    commands = [word for call in cloud.calls() for word in call if word.startswith('--command=')]
    assert commands[0] == '--command=mount it'
    assert all('--worker=0' in call for call in cloud.calls() if call[4] in ('ssh', 'scp'))


@pytest.mark.parametrize('code, expected', [(0, ['delete']), (1, []), (2, [])])
def test_delete_when_finished(cloud, code, expected):
    plan(cloud, f'{code}', state='READY')
    assert cloud.run('launch/tpu_vm.sh', *TRAIN, '--delete').returncode == code
    assert verbs(cloud) == ['scp', 'install', 'run', *expected]


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_trainers_save(cloud, sent):
    plan(cloud, 'wait', '0', state='READY')
    process = cloud.start('launch/tpu_vm.sh', *TRAIN)
    cloud.wait(process, cloud.directory / 'waiting')
    os.killpg(process.pid, sent)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 42, stderr
    assert verbs(cloud) == ['scp', 'install', 'run', 'stop']


def test_dry_run_prints_the_commands(cloud):
    result = cloud.run('launch/tpu_vm.sh', *TRAIN, '--dry_run', '--delete', '--', *FLAGS)
    assert result.returncode == 0
    assert cloud.calls() == []
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert [command[4] if command[0] == 'gcloud' else command[0] for command in commands] == [
        'create', 'tar', 'scp', 'ssh', 'ssh', 'delete']
    assert shlex.split(commands[4][-2])[-len(FLAGS):] == FLAGS


@pytest.mark.parametrize('action, verb', [('stop', 'stop'), ('delete', 'delete')])
def test_stop_and_delete(cloud, action, verb):
    plan(cloud, state='READY')
    assert cloud.run('launch/tpu_vm.sh', action, *WHERE).returncode == 0
    assert verbs(cloud) == [verb]


@pytest.mark.parametrize('flags, word', [
    ((), 'train, stop and delete'),
    (('start',), "'start'"),
    (('train', *WHERE), '--accelerator_type'),
    (('train', *WHAT), '--name'),
    (('delete', '--name=net'), '--zone'),
    ((*TRAIN, '--gin_file=a.gin'), '--gin_file=a.gin'),
    ((*TRAIN, '--spot=yes'), '--spot=yes'),
    ((*TRAIN, '--spot'), '--workdir=DIR'),
    ((*TRAIN, '--spot', '--', '--mode=train'), '--workdir=DIR'),
    ((*TRAIN, '--max_restarts=many'), 'many'),
])
def test_mistakes_are_named(cloud, flags, word):
    cloud.assert_refused(cloud.run('launch/tpu_vm.sh', *flags), word)
    assert cloud.calls() == []


def test_without_gcloud(cloud):
    (cloud.bin / 'gcloud').unlink()
    cloud.assert_refused(cloud.run('launch/tpu_vm.sh', *TRAIN), 'gcloud')
