"""launch/slurm.sbatch, with stubs of SLURM's programs: what srun is asked for, and when the job is queued again."""

import pathlib
import shlex
import signal

import pytest

SCRIPT = 'launch/slurm.sbatch'

# Runs the command as two tasks and ends with the highest of their codes; hands SIGUSR1 on to them and kills them on
# SIGTERM, as srun does.
SRUN = """
while [[ $1 == --* ]]; do shift; done
tasks=() highest=0
for i in 0 1; do SLURM_PROCID=$i "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -KILL "${tasks[@]}"' TERM
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task" || true; done
  code=0
  wait "$task" || code=$?
  ((code <= highest)) || highest=$code
done
exit "$highest"
"""


@pytest.fixture
def cluster(checkout):
    checkout.recorded('srun', SRUN)
    checkout.recorded('squeue', 'echo RUNNING')
    checkout.recorded('scontrol', '')
    return checkout


def submit(cluster, *flags: str, start: bool = False, **env: str):
    env = {'SLURM_JOB_ID': '77', 'SLURM_SUBMIT_DIR': str(cluster.root)} | env
    # SLURM runs a copy.
    copy = cluster.write(cluster.root / 'spool/slurm_script', (cluster.root / SCRIPT).read_text())
    run = cluster.start if start else cluster.run
    return run(copy.relative_to(cluster.root), *flags, cwd=cluster.root.parent, **env)


def requeues(cluster) -> list[list[str]]:
    return [call for call in cluster.calls() if call[0] == 'scontrol']


def test_each_task_trains(cluster):
    flags = ['--gin_file=a b.gin', "--gin_param=data.name = 'x'", '*']
    cluster.trainer(other='exit 0')
    result = submit(cluster, *flags)
    assert result.returncode == 0, result.stderr
    assert requeues(cluster) == []
    (srun,) = [call for call in cluster.calls() if call[0] == 'srun']
    assert srun[1] == '--ntasks-per-node=1'
    assert srun[-len(flags):] == flags
    for index in range(2):
        assert (cluster.directory / f'trainers/{index}.1').read_text().splitlines()[3:] == flags
    assert len(cluster.installed()) == 1


@pytest.mark.parametrize('codes, code', [
    ((0, 42), 42), ((42, 75), 75), ((75, 75), 75), ((0, 1), 1), ((2, 75), 2), ((1, 2), 2), ((75, 139), 1), ((42, 2), 2),
])
def test_queued_again_after_42_and_75_alone(cluster, codes, code):
    cluster.trainer(w0=f'exit {codes[0]}', w1=f'exit {codes[1]}')
    result = submit(cluster)
    assert result.returncode == code, result.stderr
    assert requeues(cluster) == ([['scontrol', 'requeue', '77']] if code in (42, 75) else [])


@pytest.mark.parametrize('state', ['COMPLETING', 'CANCELLED', 'PREEMPTED', ''])
def test_a_job_that_is_not_running_any_more_is_left_alone(cluster, state):
    cluster.recorded('squeue', f'echo {state}')
    cluster.trainer(other='exit 42')
    result = submit(cluster)
    assert result.returncode == 42
    assert 'not queued again' in result.stderr
    assert requeues(cluster) == []


@pytest.mark.parametrize('restarts, requeued', [(1, True), (2, False)])
def test_restarts_end(cluster, restarts, requeued):
    cluster.trainer(other='exit 75')
    result = submit(cluster, SLURM_RESTART_COUNT=str(restarts), MAX_RESTARTS='2')
    assert result.returncode == 75
    assert bool(requeues(cluster)) == requeued
    assert ('gives up' in result.stderr) != requeued


def test_SIGTERM_goes_on_and_the_job_is_queued_again(cluster):
    log = cluster.directory / 'trainers'
    saves = f"trap 'exit 42' TERM; : > {shlex.quote(str(log))}/$index.ready; while :; do sleep 0.02; done"
    cluster.trainer(other=saves)
    job = submit(cluster, start=True)
    cluster.wait(job, log / '0.ready', log / '1.ready')
    job.send_signal(signal.SIGTERM)
    stdout, stderr = job.communicate(timeout=30)
    assert job.returncode == 42, stderr
    assert requeues(cluster) == [['scontrol', 'requeue', '77']]


@pytest.mark.parametrize('env', [{'SLURM_JOB_ID': ''}, {'SLURM_SUBMIT_DIR': '/'}])
def test_elsewhere_it_is_refused(cluster, env):
    cluster.assert_refused(submit(cluster, **env), 'sbatch launch/slurm.sbatch')
    assert cluster.calls() == []


def test_what_it_asks_of_SLURM():
    lines = (pathlib.Path(__file__).resolve().parents[2] / SCRIPT).read_text().splitlines()
    asked = [line.removeprefix('#SBATCH ') for line in lines if line.startswith('#SBATCH ')]
    assert {'--requeue', '--ntasks-per-node=1', '--open-mode=append', '--signal=B:TERM@120'} <= set(asked)
    # SLURM stops reading them at the first command.
    assert lines.index('set -euo pipefail') > max(i for i, line in enumerate(lines) if line.startswith('#SBATCH '))
