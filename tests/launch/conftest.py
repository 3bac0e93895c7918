"""A checkout to run the launch scripts in: a PATH that holds only the tools named here, and stubs.

Nothing is installed, and nothing outside the test's own directory is touched.
"""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = (
    'awk bash cat cp df dirname env find flock gzip ln ls mkdir mktemp mv readlink rm sed seq setpriv setsid sh '
    'sha256sum sleep tar taskset wc'
).split()

# Says which Python it is, makes a virtual environment of itself, logs what pip is asked for, prints other arguments.
# What only Python can tell (free ports, the requirements in setup.py) the real one does.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) echo {version} ;;
  *ensurepip*) exit {ensurepip_status} ;;
  "-m venv "*) mkdir -p "$3/bin" && ln -sf "$0" "$3/bin/python" && echo 'made by a test' > "$3/pyvenv.cfg" ;;
  *"import socket"* | *"import ast"*) exec "{real}" "$@" ;;
  "-m pip "*) echo "$*" >> "{log}"; {pip} ;;
  *) printf '%s\\n' "$@"; exit {exit_status} ;;
esac
"""

# A trainer that writes down how it was started, then does what a test wants of this worker at this attempt.
FAKE_TRAINER = """#!/bin/sh
shift 2
index=${{SLURM_PROCID-$TF_CONFIG}} index=${{index##*index\\\": }} index=${{index%%\\}}*}}
attempt=1
while [ -e "{log}/$index.$attempt" ]; do attempt=$((attempt + 1)); done
while read -r key value; do case $key in Cpus_allowed_list:) cpus=$value ;; esac; done < /proc/self/status
printf '%s\\n' "$TF_CONFIG" "$cpus" "${{CUDA_VISIBLE_DEVICES-unset}}" "$@" > "{log}/$index.$attempt.part"
mv "{log}/$index.$attempt.part" "{log}/$index.$attempt"
case $index.$attempt in
{cases}
esac
"""


class Checkout:
    """A repository that holds only what the scripts read, and a PATH that holds only stubs and standard tools."""

    def __init__(self, directory: pathlib.Path):
        self.root, self.bin, self.log = directory / 'checkout', directory / 'bin', directory / 'pip.log'
        self.directory = directory
        self.venv = self.root / '.venv'
        shutil.copytree(ROOT / 'launch', self.root / 'launch')
        shutil.copytree(ROOT / '.ci', self.root / '.ci')
        for package in ('ghostnet', 'input_pipeline', 'trainer'):
            self.write(self.root / package / '__init__.py', '')
        self.write(self.root / 'setup.py', 'requirements')
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.stub('df', 'echo header; echo /dev/disk 99999999 1 88888888 1% /')

    def write(self, path: pathlib.Path, text: str) -> pathlib.Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def stub(self, name: str, script: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        self.write(self.bin / name, script if script.startswith('#!') else f'#!/bin/sh\n{script}\n').chmod(0o755)

    def python(self, name='python3', version='3.12', ensurepip_status=0, pip=':', exit_status=0) -> None:
        self.stub(name, FAKE_PYTHON.format(**(locals() | {'log': self.log, 'real': sys.executable})))

    def trainer(self, **behaviour: str) -> pathlib.Path:
        """Makes `python -m trainer.main` do what `w<index>_<attempt>`, `w<index>` or `other` say, in shell."""
        log = self.directory / 'trainers'
        log.mkdir()
        names = {name: '*' if name == 'other' else name[1:].replace('_', '.') for name in behaviour}
        cases = [f'  {pattern}{"" if "." in pattern or pattern == "*" else ".*"}) {behaviour[name]} ;;'
                 for name, pattern in names.items()]
        script = FAKE_TRAINER.format(log=log, cases='\n'.join(cases))
        self.stub('fake-trainer', script)
        python = self.bin / 'python3'
        python.write_text(python.read_text().replace(
            '  *) printf', f'  "-m trainer.main"*) exec "{self.bin}/fake-trainer" "$@" ;;\n  *) printf'))
        return log

    def recorded(self, name: str, script: str) -> None:
        """A stub that also writes down how it is called, one line a call, as a shell would have to write it."""
        self.stub(name, f'#!/usr/bin/env bash\nprintf "%s " {name} "${{@@Q}}" >> {self.directory}/calls\n'
                        f'echo >> {self.directory}/calls\n{script}\n')

    def calls(self) -> list[list[str]]:
        """The calls of recorded stubs, program and arguments."""
        path = self.directory / 'calls'
        return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []

    def start(self, script: str, *args: str, cwd: pathlib.Path | None = None, cpus: set[int] | None = None,
              **env: str) -> subprocess.Popen:
        def prepare() -> None:
            for ignored in (signal.SIGINT, signal.SIGHUP):  # by a shell's background jobs, by nohup
                signal.signal(ignored, signal.SIG_DFL)
            if cpus:
                os.sched_setaffinity(0, cpus)

        return subprocess.Popen(
            [self.bin / 'bash', self.root / script, *args],
            cwd=cwd or self.root,
            env={'PATH': str(self.bin), **env},
            preexec_fn=prepare,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *args: str, **kwargs) -> subprocess.CompletedProcess:
        process = self.start(script, *args, **kwargs)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def installed(self) -> list[str]:
        """What pip was asked to install, one entry a call."""
        return [line.split()[-1] for line in self.log.read_text().splitlines()] if self.log.exists() else []


    @staticmethod
    def wait(process: subprocess.Popen, *paths: pathlib.Path) -> None:
        """Returns when all paths exist; fails when the process ends before."""
        while not all(path.exists() for path in paths):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    @staticmethod
    def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
        """The user's mistake: exit code 2, one line, which has the words."""
        assert result.returncode == 2
        assert result.stdout == ''
        assert result.stderr.count('\n') == 1
        for word in words:
            assert word in result.stderr


@pytest.fixture
def checkout(tmp_path):
    checkout = Checkout(tmp_path)
    checkout.python()
    return checkout


@pytest.fixture
def log(checkout):
    return checkout.directory / 'trainers'
