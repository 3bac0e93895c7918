"""From a name to a tf.distribute.Strategy. The first thing of a run to touch devices."""
import contextlib
import ctypes
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from trainer.exits import leave
from trainer.recipe import ConfigError, is_number, require


def build_strategy(name: str = 'auto', num_devices: int | None = None, op_threads: int | None = None,
                   timeout_secs: float = 300.0, tpu: str = 'local') -> tf.distribute.Strategy:
    """Builds the strategy and says in one line what it took. Raises ConfigError: a wrong value, or what is not there.

    Args:
        name: 'one_device'; 'mirrored': all GPUs of this machine, or logical CPUs where there is none; 'multi_worker':
            all GPUs, or the CPU, of every process that TF_CONFIG or SLURM names; 'tpu': a TPU slice; 'auto': the first
            of tpu, multi_worker, mirrored that there is more than one device for, else one device.
        num_devices: GPUs or logical CPUs for 'mirrored'; None: all GPUs.
        op_threads: threads to an operation on the CPU. None: one a core; 1 is faster where parts or replicas use them.
        timeout_secs: how long a worker of 'multi_worker' waits for the others in a collective before it gives up.
        tpu: 'local' on a TPU VM, or a TPU's name.
    """
    names = ('auto', 'one_device', 'mirrored', 'multi_worker', 'tpu')
    require(name in names, 'build_strategy.name', name, f'one of {", ".join(names)}')
    for key, value in (('num_devices', num_devices), ('op_threads', op_threads)):
        require(value is None or is_number(value, 1, kind=int), f'build_strategy.{key}', value,
                'None or a positive integer')
    require(is_number(timeout_secs) and timeout_secs > 0, 'build_strategy.timeout_secs', timeout_secs,
            'a positive number of seconds')
    if op_threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(op_threads)
    # Or glibc gives the memory of tensors back to Linux, and gets it zeroed page by page: up to half of each step.
    for parameter, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
        ctypes.CDLL(None).mallopt(parameter, value)
    gpus = tf.config.list_physical_devices('GPU')
    if (num_present := len(list(Path('/proc/driver/nvidia/gpus').glob('*')))) > len(gpus):  # or a day is lost on CPUs
        logging.warning('this machine has %d NVIDIA GPUs, TensorFlow sees %d: install the cuda extra '
                        "(pip install -e '.[cuda]'), and look at CUDA_VISIBLE_DEVICES", num_present, len(gpus))
    if name == 'auto' and os.environ.get('PJRT_DEVICE') == 'TPU':  # launch/tpu_vm.sh sets it, or no chips are found
        name = 'tpu'
    elif name == 'auto' and num_devices is None and _find_cluster() is not None:
        name = 'multi_worker'
    elif name == 'auto':
        name = 'mirrored' if (num_devices or len(gpus)) > 1 else 'one_device'
    if num_devices is not None and name != 'mirrored' and (name, num_devices) != ('one_device', 1):
        raise ConfigError(f'build_strategy.num_devices is {num_devices} with {name}; take mirrored')
    if name == 'tpu':
        return _build_tpu_strategy(tpu)
    if name == 'multi_worker':
        return _build_multi_worker_strategy(len(gpus), timeout_secs)
    kind, count = 'GPU' if gpus else 'CPU', 1 if name == 'one_device' else num_devices or len(gpus) or 1
    if not gpus:
        with contextlib.suppress(RuntimeError):  # TensorFlow has started: what it has then counts
            tf.config.set_logical_device_configuration(tf.config.list_physical_devices('CPU')[0],
                                                       [tf.config.LogicalDeviceConfiguration()] * count)
    if (present := len(tf.config.list_logical_devices(kind))) < count:
        raise ConfigError(f'build_strategy.num_devices is {num_devices}, but TensorFlow has started with {present} '
                          f'{kind}s; logical CPUs are made before anything is computed')
    devices = [f'{kind}:{i}' for i in range(count)]
    logging.info('strategy %s on %s', name, ', '.join(devices))
    if name == 'one_device':
        return tf.distribute.OneDeviceStrategy(*devices)
    return tf.distribute.MirroredStrategy(devices)


def has_accelerator() -> bool:
    """Whether steps run on a GPU or a TPU, where XLA is faster than op by op."""
    return bool(tf.config.list_physical_devices('GPU') or tf.config.list_physical_devices('TPU'))


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Whether other processes take part."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def find_worker(strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """(which worker this process is, of how many)."""
    resolver = strategy.cluster_resolver
    return (resolver.task_id, resolver.cluster_spec().num_tasks('worker')) if is_multi_worker(strategy) else (0, 1)


def describe_worker(strategy: tf.distribute.Strategy, index: int | None = None) -> str:
    """'worker 1 (host:port)' of many, for messages; by default this one."""
    index = strategy.cluster_resolver.task_id if index is None else index
    return f'worker {index} ({strategy.cluster_resolver.cluster_spec().task_address("worker", index)})'


def take_turns(strategy: tf.distribute.Strategy, sum_over_workers: Callable[[int], int],
               action: Callable[[], None]) -> None:
    """Calls `action` on each worker while the others wait; to be called by all."""
    own, num_workers = find_worker(strategy)
    for worker in range(num_workers):
        if worker == own:
            action()
        sum_over_workers(0)


def _find_cluster() -> tf.distribute.cluster_resolver.ClusterResolver | None:
    """The cluster that TF_CONFIG or SLURM describes, if it has more than one worker."""
    if text := os.environ.get('TF_CONFIG'):
        try:
            resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
            workers = resolver.cluster_spec().as_dict()['worker']
            if resolver.task_type != 'worker' or not 0 <= resolver.task_id < len(workers):
                raise ValueError(f'task {resolver.task_type} {resolver.task_id} is none of the {len(workers)} workers')
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f'TF_CONFIG is {text!r}: {error!r}; it must be as {{"cluster": {{"worker": ["host:port", '
                              '...]}, "task": {"type": "worker", "index": 0}}') from error
        return resolver if len(workers) > 1 else None
    is_slurm = int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)) > 1
    return tf.distribute.cluster_resolver.SlurmClusterResolver() if is_slurm else None


def _build_multi_worker_strategy(num_gpus: int, timeout_secs: float) -> tf.distribute.Strategy:
    if (resolver := _find_cluster()) is None:
        raise ConfigError("build_strategy.name is 'multi_worker', but neither TF_CONFIG nor SLURM names more than one "
                          'worker: start it with launch/multi_worker.sh or launch/slurm.sbatch, or take --workers')
    _wait_for_all(resolver, timeout_secs)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, tf.distribute.experimental.CommunicationOptions(
        timeout_seconds=timeout_secs, implementation='NCCL' if num_gpus else 'RING'))
    strategy.peer_timeout_secs = timeout_secs  # for preemption.Watchdog
    logging.info('strategy multi_worker: this is %s of %d, with %s', describe_worker(strategy),
                 resolver.cluster_spec().num_tasks('worker'), f'{num_gpus} GPUs' if num_gpus else 'a CPU')
    return strategy


def _wait_for_all(resolver: tf.distribute.cluster_resolver.ClusterResolver, timeout_secs: float) -> None:
    """TensorFlow itself waits an hour for a worker that does not come, holds Python's lock, and hears no signal."""
    addresses, own = dict(enumerate(resolver.cluster_spec().as_dict()['worker'])), resolver.task_id
    deadline, absent = time.monotonic() + timeout_secs, addresses.keys() - {own}
    try:
        server = socket.create_server(('', int(addresses[own].rpartition(':')[2])), backlog=1024)
    except OSError as error:
        raise ConfigError(f'worker {own} cannot listen on {addresses[own]}: {error}') from error
    with server:  # until all have come, who then find TensorFlow's own server here
        while absent:
            for i in sorted(absent):
                host, _, port = addresses[i].rpartition(':')
                with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
                    absent.remove(i)
            if absent and time.monotonic() > deadline:
                leave(f'{", ".join(f"worker {i} ({addresses[i]})" for i in sorted(absent))} did not come within '
                      f'build_strategy.timeout_secs = {timeout_secs:g}')
            time.sleep(0.1)


def _build_tpu_strategy(tpu: str) -> tf.distribute.Strategy:
    """Never run on a TPU by the authors of this file."""
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(tpu)  # to 'local' there is no connection
    except (ValueError, tf.errors.OpError) as error:
        raise ConfigError(f"build_strategy.name is 'tpu' and build_strategy.tpu {tpu!r}, but no TPU answers: "
                          f'{str(error).splitlines()[0]}; start it with launch/tpu_vm.sh on a TPU VM') from error
    strategy = tf.distribute.TPUStrategy(resolver)
    logging.info('strategy tpu on %d cores of %s', strategy.num_replicas_in_sync, tpu)
    return strategy
