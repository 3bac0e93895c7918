"""launch/multi_worker.sh: signals go on to the workers, and none is left: not one that hangs, nor its children."""

import os
import pathlib
import signal
import subprocess

import pytest
from worker_harness import QUICK, SCRIPT, attempts, deaf, saves_on_sigterm


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_goes_on_and_ends_it(checkout, log, sent):
    checkout.trainer(w0=saves_on_sigterm(log, 0), w1=saves_on_sigterm(log, 1))
    process = checkout.start(SCRIPT, '--workers=2', *QUICK)
    checkout.wait(process, log / '0.ready', log / '1.ready')
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 42, stderr
    assert len(attempts(log, 0)) == len(attempts(log, 1)) == 1


def test_the_keyboard_reaches_the_workers_only_through_the_script(checkout, log):
    checkout.trainer(w0=f"trap 'exit 3' INT; {saves_on_sigterm(log, 0)}")
    process = checkout.start(SCRIPT, '--workers=1')
    checkout.wait(process, log / '0.ready')
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 42


def test_a_signal_during_the_pause_ends_it(checkout, log):
    checkout.trainer(other='exit 75')
    process = checkout.start(SCRIPT, '--workers=1', '--pause_secs=999')
    while 'restart 1' not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert len(attempts(log, 0)) == 1


def test_a_worker_not_yet_ready_for_signals_is_no_crash(checkout, log):
    checkout.trainer(w0=f': > {log}/0.ready; exec sleep 60')
    process = checkout.start(SCRIPT, '--workers=1', *QUICK)
    checkout.wait(process, log / '0.ready')
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_the_second_SIGINT_kills(checkout, log):
    checkout.trainer(w0=deaf(log, 0))
    process = checkout.start(SCRIPT, '--workers=1', *QUICK)
    checkout.wait(process, log / '0.ready')
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.4)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 75


@pytest.mark.parametrize('failed, code', [(75, 75), (42, 75), (1, 1), (2, 2)])
def test_a_worker_that_hangs_is_killed_after_the_grace(checkout, log, failed, code):
    ready = f'while ! [ -e {log}/1.ready ]; do sleep 0.02; done'
    checkout.trainer(w0=f'{ready}; exit {failed}', w1=deaf(log, 1))
    result = checkout.run(SCRIPT, '--workers=2', '--grace_secs=1', '--max_restarts=0')
    assert result.returncode == code
    assert '1 s after another failed still running: worker 1' in result.stderr
    assert 'worker 1 ended with exit code 137' in result.stderr
    assert 'Killed' not in result.stderr


def test_a_worker_that_is_stopped_is_killed_too(checkout, log):
    checkout.trainer(w0='sleep 0.2; exit 75', w1='kill -STOP $$')
    result = checkout.run(SCRIPT, '--workers=2', '--grace_secs=0', '--max_restarts=0')
    assert result.returncode == 75
    assert 'worker 1 ended with exit code 137' in result.stderr


def test_after_the_grace_SIGTERM_comes_first(checkout, log):
    ready = f'while ! [ -e {log}/1.ready ]; do sleep 0.02; done'
    checkout.trainer(w0=f'{ready}; exit 75', w1=saves_on_sigterm(log, 1))
    result = checkout.run(SCRIPT, '--workers=2', '--grace_secs=1', '--max_restarts=0')
    assert result.returncode == 75
    assert 'worker 1 ended with exit code 42' in result.stderr


def test_a_worker_that_finished_hurries_nobody(checkout, log):
    checkout.trainer(w0='sleep 0.5; exit 0', w1='exit 0')
    assert checkout.run(SCRIPT, '--workers=2', '--grace_secs=0').returncode == 0


def test_a_worker_killed_from_outside_is_a_crash(checkout):
    checkout.trainer(w0='kill -9 $$', w1='exit 75')
    result = checkout.run(SCRIPT, '--workers=2', *QUICK)
    assert result.returncode == 1
    assert 'worker 0 ended with exit code 137' in result.stderr
    # Beside them the shell's own line on the process that was killed, which comes when it comes.
    others = [line for line in result.stderr.splitlines() if not line.startswith('multi_worker.sh: ')]
    assert len(others) <= 1 and all('Killed' in line for line in others), result.stderr


def test_what_a_worker_left_running_ends_with_it(checkout, log):
    checkout.trainer(w0=f'sleep 60 & echo $! > {log}/child; exit 0')
    assert checkout.run(SCRIPT, '--workers=1').returncode == 0
    child = int((log / 'child').read_text())
    status = pathlib.Path(f'/proc/{child}/status')
    assert not status.exists() or 'zombie' in status.read_text()


def test_a_killed_script_leaves_no_worker(checkout, log):
    checkout.trainer(w0=saves_on_sigterm(log, 0).replace('exit 42', f': > {log}/saved; exit 42'))
    process = checkout.start(SCRIPT, '--workers=1')
    checkout.wait(process, log / '0.ready')
    process.kill()
    process.communicate(timeout=30)  # returns when the last process with this pipe has ended
    assert (log / 'saved').exists()
