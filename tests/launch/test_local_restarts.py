"""launch/local.sh around a trainer that ends or is told to: exit codes, restarts, signals; with stubs (conftest.py)."""

import os
import signal
import subprocess

import pytest
from worker_harness import saves_on_sigterm


@pytest.mark.parametrize('status', [0, 1, 2, 42, 75])
def test_the_exit_code_is_the_trainers(checkout, status):
    checkout.python(exit_status=status)
    result = checkout.run('launch/local.sh', MAX_RESTARTS='0')
    assert result.returncode == status
    assert checkout.run('launch/local.sh', MAX_RESTARTS='0').stderr == ''


@pytest.mark.parametrize('status', [42, 75])
def test_after_42_and_75_it_starts_again(checkout, log, status):
    checkout.trainer(w_1=f'exit {status}', w_2='exit 0')
    result = checkout.run('launch/local.sh', '--workdir=w')
    assert result.returncode == 0
    assert f'exit code {status}: restart 1 of 10 in a row' in result.stderr
    assert sorted(path.name for path in log.iterdir()) == ['.1', '.2']
    assert (log / '.1').read_text() == (log / '.2').read_text()


def test_restarts_in_a_row_are_bounded(checkout, log):
    checkout.trainer(other='exit 75')
    result = checkout.run('launch/local.sh', MAX_RESTARTS='1')
    assert result.returncode == 75
    assert 'gives up after 1 restarts in a row' in result.stderr
    checkout.assert_refused(checkout.run('launch/local.sh', MAX_RESTARTS='ten'), 'MAX_RESTARTS=ten')
    assert len(list(log.iterdir())) == 2


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_goes_on_to_the_trainer_which_is_not_started_again(checkout, log, sent):
    checkout.trainer(other=saves_on_sigterm(log, 0))
    process = checkout.start('launch/local.sh')
    checkout.wait(process, log / '0.ready')
    if sent in (signal.SIGINT, signal.SIGHUP):  # as a terminal sends them
        os.killpg(process.pid, sent)
    else:
        process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 42, stderr
    assert stderr.count('restart') == 0
    assert len(list(log.glob('.[0-9]'))) == 1


def test_so_does_each_later_one(checkout, log):
    count = f"n=0; trap 'n=$((n + 1)); : > {log}/came$n; [ $n -lt 2 ] || exit 7' TERM"
    checkout.trainer(other=f'{count}; : > {log}/ready; while :; do sleep 0.02; done')
    process = checkout.start('launch/local.sh')
    checkout.wait(process, log / 'ready')
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: the trainer has it through the script, and once
    checkout.wait(process, log / 'came1')
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.4)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 7


def test_a_killed_script_leaves_no_trainer(checkout, log):
    checkout.trainer(other=saves_on_sigterm(log, 0))
    process = checkout.start('launch/local.sh')
    checkout.wait(process, log / '0.ready')
    process.kill()
    process.communicate(timeout=30)  # returns when the last process with this pipe has ended
