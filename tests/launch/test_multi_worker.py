"""launch/multi_worker.sh: what each worker is told and given, what its own code is, when it starts them again."""

import os
import socket

import pytest
from worker_harness import QUICK, SCRIPT, attempts


def test_the_workers_know_each_other(checkout, log):
    checkout.trainer(other='exit 0')
    assert checkout.run(SCRIPT, '--workers=3').returncode == 0
    configs = [attempts(log, index)[0]['config'] for index in range(3)]
    addresses = configs[0]['cluster']['worker']
    assert len({address.removeprefix('127.0.0.1:') for address in addresses}) == 3
    assert all(1024 <= int(address.removeprefix('127.0.0.1:')) < 65536 for address in addresses)
    for index, config in enumerate(configs):
        assert config == {'cluster': {'worker': addresses}, 'task': {'type': 'worker', 'index': index}}


@pytest.mark.parametrize('codes, worst', [
    ((0, 0), 0), ((0, 42), 42), ((42, 75), 75), ((75, 1), 1), ((1, 2), 2), ((2, 42), 2), ((75, 0), 75), ((42, 1), 1),
    ((139, 75), 1), ((3, 42), 1), ((137, 2), 2),
])
def test_the_worst_code_counts(checkout, codes, worst):
    checkout.trainer(w0=f'exit {codes[0]}', w1=f'exit {codes[1]}')
    result = checkout.run(SCRIPT, '--workers=2', '--max_restarts=0')
    assert result.returncode == worst, result.stderr
    for index, code in enumerate(codes):
        assert (f'worker {index} ended with exit code {code}\n' in result.stderr) == (code != 0)


@pytest.mark.parametrize('code', [42, 75])
def test_all_are_started_again_together(checkout, log, code):
    checkout.trainer(w1_1=f'exit {code}', w0_2=f'exit {code}', other='exit 0')
    result = checkout.run(SCRIPT, '--workers=2', *QUICK)
    assert result.returncode == 0
    assert 'restart 2 of 10' in result.stderr
    assert [len(attempts(log, index)) for index in range(2)] == [3, 3]


@pytest.mark.parametrize('code', [0, 1, 2, 139])
def test_nothing_else_is_started_again(checkout, log, code):
    checkout.trainer(w1=f'exit {code}', other=f'exit {75 if code else 0}')
    checkout.run(SCRIPT, '--workers=2', *QUICK)
    assert len(attempts(log, 0)) == len(attempts(log, 1)) == 1


def test_restarts_in_a_row_end(checkout, log):
    checkout.trainer(other='exit 75')
    result = checkout.run(SCRIPT, '--workers=1', '--max_restarts=2', *QUICK)
    assert result.returncode == 75
    assert 'gives up after 2 restarts' in result.stderr
    assert len(attempts(log, 0)) == 3


def test_workers_that_got_somewhere_are_no_longer_in_the_row(checkout, log):
    checkout.trainer(w0_4='exit 0', other='exit 42')
    assert checkout.run(SCRIPT, '--workers=1', '--max_restarts=1', '--settled_secs=0', *QUICK).returncode == 0
    assert len(attempts(log, 0)) == 4


def test_flags_arrive_as_they_were_given(checkout, log):
    flags = ['--workdir=a directory', "--gin_param=data.name = 'x'", '--gin_param=a="b"', '*', '$HOME', '', '--',
             '--port=1']
    checkout.trainer(other='exit 0')
    assert checkout.run(SCRIPT, '--workers=2', '--', *flags).returncode == 0
    assert attempts(log, 0)[0]['flags'] == attempts(log, 1)[0]['flags'] == flags


def test_stdout_is_that_of_worker_0(checkout):
    checkout.trainer(other='echo "{$index}"; echo progress >&2; exit 0')
    result = checkout.run(SCRIPT, '--workers=2')
    assert result.stdout == '{0}\n'
    lines = [line for line in result.stderr.splitlines() if line.startswith('[')]
    assert sorted(lines) == ['[worker 0] progress', '[worker 1] progress', '[worker 1] {1}']


def test_ports_follow_the_first(checkout, log):
    with socket.socket() as probe:
        probe.bind(('', 0))
        port = min(probe.getsockname()[1], 65000)
    checkout.trainer(other='exit 0')
    result = checkout.run(SCRIPT, '--workers=2', f'--port={port}')
    if result.returncode == 2:
        pytest.skip(f'somebody took a port meanwhile: {result.stderr}')
    assert attempts(log, 0)[0]['config']['cluster']['worker'] == [f'127.0.0.1:{port}', f'127.0.0.1:{port + 1}']


@pytest.mark.parametrize('form', [
    '--workers=1 --port={port}', '--hosts=a,b:{port} --index=1', '--hosts=a --index=0 --port={port}',
])
def test_a_port_that_is_taken_is_named(checkout, log, form):
    checkout.trainer(other='exit 0')
    checkout.run(SCRIPT, '--workers=1')
    with socket.socket() as taken:
        taken.bind(('', 0))
        taken.listen()
        port = taken.getsockname()[1]
        checkout.assert_refused(checkout.run(SCRIPT, *form.format(port=port).split()), str(port), 'in use')
    assert len(attempts(log, 0)) == 1


def test_one_worker_a_host(checkout, log):
    checkout.trainer(w1_1='exit 75', other='exit 0')
    with socket.socket() as probe:
        probe.bind(('', 0))
        port = probe.getsockname()[1]
    hosts = f'--hosts=alpha,beta.example:{port},gamma'
    result = checkout.run(SCRIPT, hosts, '--index=1', *QUICK, '--', '--mode=train')
    assert result.returncode == 0, result.stderr
    assert attempts(log, 0) == attempts(log, 2) == []
    first, second = attempts(log, 1)
    assert first == second
    assert first['flags'] == ['--mode=train']
    assert first['config'] == {'cluster': {'worker': ['alpha:2222', f'beta.example:{port}', 'gamma:2222']},
                               'task': {'type': 'worker', 'index': 1}}
    assert result.stdout == ''


@pytest.mark.parametrize('flags, word', [
    ((), '--workers=N'),
    (('--workers=0',), '--workers=N'),
    (('--workers=two',), '--workers=two is no number'),
    (('--workers',), '--workers needs a value'),
    (('--workers=2', '--gin_file=a.gin'), '--gin_file=a.gin'),
    (('--workers=2', 'gin/imagenet.gin'), 'gin/imagenet.gin'),
    (('--workers=2', '--index=0'), '--index'),
    (('--workers=2', '--hosts=a,b', '--index=0'), '--workers'),
    (('--hosts=a,b',), '--index=0 to --index=1'),
    (('--hosts=a,b', '--index=2'), '--index=1'),
    (('--hosts=a;b', '--index=0'), "'a;b'"),
    (('--hosts=a,,b', '--index=0'), "''"),
    (('--hosts=a,[fd00::1]', '--index=0'), 'IPv4'),
    (('--workers=2', '--port=65535'), 'no room'),
    (('--workers=1', '--grace_secs=-1'), 'is no number'),
])
def test_mistakes_are_named_before_anything_is_installed(checkout, flags, word):
    checkout.assert_refused(checkout.run(SCRIPT, *flags), word)
    assert checkout.installed() == []


def test_the_head_of_the_script_is_its_help(checkout):
    result = checkout.run(SCRIPT, '--help')
    assert (result.returncode, result.stderr) == (0, '')
    assert '--grace_secs=60' in result.stdout
    assert 'Exit code' in result.stdout
    assert 'set -e' not in result.stdout


def cpu_set(text: str) -> set[int]:
    """'0-2,5' -> {0, 1, 2, 5}."""
    ends = [part.split('-') for part in text.split(',')]
    return {cpu for end in ends for cpu in range(int(end[0]), int(end[-1]) + 1)}


def test_workers_share_the_cores(checkout, log):
    cpus = set(sorted(os.sched_getaffinity(0))[:2])
    if len(cpus) < 2:
        pytest.skip('one core cannot be shared out')
    checkout.trainer(other='exit 0')
    checkout.run(SCRIPT, '--workers=2', cpus=cpus)
    first, second = (cpu_set(attempts(log, index)[0]['cpus']) for index in range(2))
    assert len(first) == len(second) == 1
    assert first | second == cpus


@pytest.mark.parametrize('workers, remove', [(1, False), (3, False), (2, True)])
def test_without_enough_cores_or_taskset_none_is_assigned(checkout, log, workers, remove):
    cpus = set(sorted(os.sched_getaffinity(0))[:2])
    if remove:
        (checkout.bin / 'taskset').unlink()
    checkout.trainer(other='exit 0')
    assert checkout.run(SCRIPT, f'--workers={workers}', cpus=cpus).returncode == 0
    for index in range(workers):
        assert cpu_set(attempts(log, index)[0]['cpus']) == cpus


@pytest.fixture
def gpus(checkout):
    def present(num: int) -> None:
        checkout.stub('nvidia-smi', f'for i in $(seq 0 {num - 1}); do echo "GPU $i: a GPU (UUID: GPU-$i)"; done')
    return present


@pytest.mark.parametrize('num, expected', [(2, ['0', '1']), (4, ['0,1', '2,3']), (5, ['0,1', '2,3'])])
def test_workers_share_the_gpus(checkout, log, gpus, num, expected):
    gpus(num)
    checkout.trainer(other='exit 0')
    result = checkout.run(SCRIPT, '--workers=2')
    assert [attempts(log, index)[0]['gpus'] for index in range(2)] == expected
    assert ('takes 4 of 5 GPUs' in result.stderr) == (num == 5)
    assert checkout.installed() == [f'{checkout.root}[cuda]']


def test_a_choice_of_gpus_stays(checkout, log, gpus):
    gpus(1)
    checkout.trainer(other='exit 0')
    assert checkout.run(SCRIPT, '--workers=2', CUDA_VISIBLE_DEVICES='').returncode == 0
    assert attempts(log, 1)[0]['gpus'] == ''


def test_one_worker_has_all_gpus(checkout, log, gpus):
    gpus(4)
    checkout.trainer(other='exit 0')
    checkout.run(SCRIPT, '--workers=1')
    assert attempts(log, 0)[0]['gpus'] == 'unset'


def test_fewer_gpus_than_workers(checkout, log, gpus):
    gpus(2)
    checkout.trainer(other='exit 0')
    checkout.run(SCRIPT, '--workers=1')
    checkout.assert_refused(checkout.run(SCRIPT, '--workers=3'), '2 GPUs for 3 workers', 'CUDA_VISIBLE_DEVICES')
