"""What the tests of launch/multi_worker.sh share: how workers were started, and trainers that wait for a signal."""

import itertools
import json
import pathlib
import shlex

SCRIPT = 'launch/multi_worker.sh'
QUICK = ('--pause_secs=0',)


def attempts(log: pathlib.Path, index: int) -> list[dict]:
    """How often worker `index` was started, and with what."""
    found = []
    for attempt in itertools.count(1):
        path = log / f'{index}.{attempt}'
        if not path.exists():
            return found
        config, cpus, gpus, *flags = path.read_text().splitlines()
        found.append({'config': json.loads(config), 'cpus': cpus, 'gpus': gpus, 'flags': flags})


def saves_on_sigterm(log: pathlib.Path, index: int) -> str:
    """A trainer as the contract has it: SIGTERM means to save and exit 42. Leaves a file when it is ready for that."""
    return f"trap 'exit 42' TERM; : > {shlex.quote(str(log))}/{index}.ready; while :; do sleep 0.02; done"


def deaf(log: pathlib.Path, index: int) -> str:
    return saves_on_sigterm(log, index).replace("'exit 42'", "''")
