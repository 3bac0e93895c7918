"""launch/kubernetes/ and launch/Dockerfile, without a cluster or an engine: what the files themselves tell."""

import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def jobset():
    return yaml.safe_load((ROOT / 'launch/kubernetes/jobset.yaml').read_text())


@pytest.fixture(scope='module')
def job(jobset):
    (replicated,) = jobset['spec']['replicatedJobs']
    assert replicated['replicas'] == 1
    return replicated['template']['spec']


@pytest.fixture(scope='module')
def container(job):
    (container,) = job['template']['spec']['containers']
    return container


def action(job: dict, code: int, is_disrupted: bool = False) -> str:
    """What Kubernetes does after a pod ended with `code`: the first rule that fits, else the code is counted."""
    for rule in job['podFailurePolicy']['rules']:
        if any(condition['type'] == 'DisruptionTarget' for condition in rule.get('onPodConditions', ())):
            if is_disrupted:
                return rule['action']
        elif 'onExitCodes' in rule and code != 0:
            listed = code in rule['onExitCodes']['values']
            if listed == (rule['onExitCodes']['operator'] == 'In'):
                return rule['action']
    return 'Count'


def outcome(jobset: dict, job: dict, code: int, **kwargs) -> str:
    """What becomes of the whole set: JobSet knows only the reason for which the Job failed."""
    if code == 0:
        return 'Completed'
    assert job['backoffLimit'] == 0
    reason = {'Count': 'BackoffLimitExceeded', 'FailJob': 'PodFailurePolicy'}[action(job, code, **kwargs)]
    for rule in jobset['spec']['failurePolicy']['rules']:
        if reason in rule['onJobFailureReasons']:
            return rule['action']
    return 'RestartJobSet'


@pytest.mark.parametrize('code, expected', [
    (0, 'Completed'), (2, 'FailJobSet'), (1, 'FailJobSet'), (42, 'RestartJobSet'), (75, 'RestartJobSet'),
    (137, 'FailJobSet'),
])
def test_all_pods_are_made_anew_after_42_and_75_alone(jobset, job, code, expected):
    assert outcome(jobset, job, code) == expected


@pytest.mark.parametrize('code', [1, 42, 137, 143])
def test_all_pods_are_made_anew_after_an_eviction(jobset, job, code):
    assert outcome(jobset, job, code, is_disrupted=True) == 'RestartJobSet'


def test_the_api_versions_and_what_they_demand(jobset, job, container):
    assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert jobset['spec']['failurePolicy']['maxRestarts'] > 0
    assert job['completionMode'] == 'Indexed'
    assert job['parallelism'] == job['completions'] == int(container['env'][0]['value'])
    # A podFailurePolicy is refused with any other, and names a container that has to exist.
    assert job['template']['spec']['restartPolicy'] == 'Never'
    rules = job['podFailurePolicy']['rules']
    assert {rule['onExitCodes']['containerName'] for rule in rules if 'onExitCodes' in rule} == {container['name']}
    assert job['template']['spec']['terminationGracePeriodSeconds'] >= 120
    mounts, volumes = container['volumeMounts'], job['template']['spec']['volumes']
    assert [mount['name'] for mount in mounts] == [volume['name'] for volume in volumes]


def test_each_pod_is_one_host_of_multi_worker(jobset, container, checkout):
    checkout.recorded('multi_worker', '')
    (checkout.root / 'launch/multi_worker.sh').unlink()
    (checkout.root / 'launch/multi_worker.sh').symlink_to(checkout.bin / 'multi_worker')
    flags = ['--workdir=a b', '$HOME']
    env = {'PATH': str(checkout.bin), 'NUM_WORKERS': '3', 'JOB_COMPLETION_INDEX': '2'}
    subprocess.run([*container['command'], *flags], cwd=checkout.root, env=env, check=True, timeout=60)
    name = jobset['metadata']['name']
    hosts = ','.join(f'{name}-workers-0-{index}.{name}' for index in range(3))
    assert checkout.calls() == [['multi_worker', f'--hosts={hosts}', '--index=2', '--max_restarts=0', '--', *flags]]
    assert container['ports'] == [{'containerPort': 2222}]


def test_the_shell_in_it_is_clean(container, tmp_path):
    path = pathlib.Path(sys.executable).with_name('shellcheck')
    if not path.exists():
        pytest.skip('shellcheck is not installed: launch/test.sh installs it')
    (tmp_path / 'entry.sh').write_text('#!/usr/bin/env bash\n' + container['command'][2])
    result = subprocess.run([path, tmp_path / 'entry.sh'], capture_output=True, text=True)
    assert result.stdout + result.stderr == ''


def docker_instructions() -> list[tuple[str, str]]:
    lines = (ROOT / 'launch/Dockerfile').read_text().splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith('#')]


def test_what_the_image_copies_exists():
    copied = {source for name, rest in docker_instructions() if name == 'COPY' for source in rest.split()[:-1]}
    assert {'ghostnet', 'input_pipeline', 'trainer', 'gin', 'launch', 'setup.py'} <= copied
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_the_image_is_no_roots_and_trains():
    names = [name for name, _ in docker_instructions()]
    assert names[0] == 'FROM' and names[-2:] == ['USER', 'ENTRYPOINT']
    assert dict(docker_instructions())['ENTRYPOINT'] == '["./launch/local.sh"]'
    assert 'never built' in (ROOT / 'launch/Dockerfile').read_text().lower()


def test_an_environment_made_as_the_image_does_is_finished(checkout, tmp_path):
    (command,) = [rest for name, rest in docker_instructions() if name == 'RUN' and 'prepare' in rest]
    venv = str(tmp_path / 'venv')
    env = {'PATH': str(checkout.bin), 'VENV': venv}
    subprocess.run([shutil.which('sh'), '-c', command], cwd=checkout.root, env=env, check=True, timeout=60)
    assert checkout.installed() == [f'{checkout.root}[cuda]']
    result = checkout.run('launch/local.sh', VENV=venv)
    assert (result.returncode, result.stderr) == (0, '')
    assert len(checkout.installed()) == 1
    assert shlex.split(result.stdout)[:2] == ['-m', 'trainer.main']
