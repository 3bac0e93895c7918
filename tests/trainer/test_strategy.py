"""A strategy that cannot be built is refused in one line, before TensorFlow starts; what one sets for its process."""
import os
import subprocess
import sys

import pytest

from trainer.recipe import ConfigError
from trainer.strategy import build_strategy


@pytest.mark.parametrize(('cluster', 'words'), [
    ('', 'neither TF_CONFIG nor SLURM names more than one worker'),
    ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}', 'names more than one worker'),
    ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}', 'none of the 2 workers'),
    ('{"cluster": {"worker": ["a:1"', 'TF_CONFIG is'),
    ('{"cluster": {"chief": ["a:1"]}, "task": {"type": "chief", "index": 0}}', 'TF_CONFIG is'),
])
def test_a_cluster_that_is_none_gives_one_line(cluster, words, monkeypatch):
    monkeypatch.setenv('TF_CONFIG', cluster)
    monkeypatch.delenv('SLURM_STEP_NUM_TASKS', raising=False)
    with pytest.raises(ConfigError, match=words) as error:
        build_strategy('multi_worker')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('settings', 'words'), [
    ({'name': 'parameter_server'}, "build_strategy.name is 'parameter_server'; it must be one of auto, one_device"),
    ({'num_devices': 0}, 'build_strategy.num_devices is 0; it must be None or a positive integer'),
    ({'name': 'one_device', 'num_devices': 2}, 'build_strategy.num_devices is 2 with one_device; take mirrored'),
    ({'name': 'multi_worker', 'num_devices': 2}, 'build_strategy.num_devices is 2 with multi_worker; take mirrored'),
    ({'op_threads': 0}, 'build_strategy.op_threads is 0; it must be None or a positive integer'),
    ({'timeout_secs': 0}, 'build_strategy.timeout_secs is 0; it must be a positive number of seconds'),
])
def test_a_wrong_setting_gives_one_line(settings, words):
    with pytest.raises(ConfigError) as error:
        build_strategy(**settings)
    assert str(error.value).startswith(words)


# Blocks larger than glibc's largest threshold, which it always takes from the kernel and gives back.
FAULTS = """
import resource
from trainer.main import import_tensorflow
import_tensorflow()
import os
import numpy as np
from trainer.strategy import build_strategy

def count_faults():
    for _ in range(3):
        block = np.ones(48 << 20, np.uint8)
        del block
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(48 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = count_faults()
build_strategy('one_device')
print(before, count_faults(), os.environ['TF_ENABLE_ONEDNN_OPTS'])
"""


@pytest.mark.parametrize(('given', 'taken'), [({}, '1'), ({'TF_ENABLE_ONEDNN_OPTS': '0'}, '0')])
def test_memory_stays_with_the_process_and_onednn_is_on_unless_told_otherwise(given, taken):
    environment = {name: value for name, value in os.environ.items() if name != 'TF_ENABLE_ONEDNN_OPTS'} | given
    command = [sys.executable, '-c', FAULTS]
    before, after, onednn = subprocess.run(command, env=environment, capture_output=True, text=True, check=True,
                                           timeout=300).stdout.split()
    assert int(before) >= 20  # huge pages of 2 MB, or many more
    assert int(after) < 5
    assert onednn == taken
