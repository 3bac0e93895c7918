"""The command: absl flags -> configuration -> strategy -> mode. Turns a user's mistake into one line and exit code 2.

Exit codes: 0 finished, 1 nothing could be saved for too long, 2 the user's mistake, 42 stopped by a signal and saved,
75 a worker is lost, a step hangs or data cannot be read; else a crash. The same command resumes. stdout: results alone.
"""
import gc
import json
import logging
import os
import re
import sys
import tempfile
from pathlib import Path

from absl import flags

from trainer.recipe import ConfigError, require

_FLAGS = flags.FLAGS
flags.DEFINE_multi_string('gin_file', [], 'A gin file; repeats, later ones win. Looked up here, then in the project.')
flags.DEFINE_multi_string('gin_param', [], "A binding as 'ghostnet.width=0.5'; repeats, after all files.")
flags.DEFINE_alias('gin_bindings', 'gin_param')
flags.DEFINE_string('workdir', None, 'Where the run lives. Default: runs/<last gin file that is not in hardware/>.')
flags.DEFINE_string('data_dir', None, "Where the data is. Default: the recipe's, TFDS_DATA_DIR, ~/tensorflow_datasets.")
flags.DEFINE_enum('mode', 'train', ['train', 'eval', 'benchmark'], 'train: train, evaluate and resume; eval: evaluate '
                  'a checkpoint; benchmark: how fast the input is, the step, and both.')
flags.DEFINE_list('workers', [], 'host:port of every worker, where neither TF_CONFIG nor SLURM names them.')
flags.DEFINE_integer('worker_index', None, 'Which of --workers this process is, from 0.')


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code; a run that was stopped ends the process itself."""
    if {'--help', '-help', '-h'} & set(argv[1:]):
        print(f'{__doc__}\n{_FLAGS.module_help(sys.modules[__name__])}')
        return 0
    try:
        if stray := _FLAGS(argv)[1:]:
            raise flags.Error(f'unexpected argument {stray[0]!r}: every setting is a flag, as --gin_file={stray[0]}')
    except flags.Error as error:
        print(f'error: {error}'.replace('\n', ' '), file=sys.stderr)
        return 2
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format='%(message)s', force=True)
    logging.getLogger('absl').setLevel(logging.WARNING)  # TFDS' own progress is of no use to the reader
    import_tensorflow()
    from input_pipeline import DataError
    from trainer.exits import EXIT_STOPPED, end
    from trainer.preemption import StoppedEarly, StopSignals
    from trainer.saver import SaveError
    try:
        with StopSignals() as signals:
            _run(signals)
    except (ConfigError, DataError, SaveError) as error:
        print(f'error: {next(iter(str(error).splitlines()), "")}', file=sys.stderr)
        return 1 if isinstance(error, SaveError) else 2
    except StoppedEarly as stopped:  # iterators that it holds may take a minute to end, which no scheduler waits
        end(EXIT_STOPPED, f'{stopped}: the same command resumes')
    return 0


def _run(signals) -> None:
    import tensorflow as tf

    import input_pipeline
    from trainer import benchmark, config, evaluate, loop
    from trainer.preemption import leave_to_try_again
    loaded = config.load(_FLAGS.gin_file, _FLAGS.gin_param)
    recipes = [Path(file).stem for file in _FLAGS.gin_file if Path(file).parent.name != 'hardware']
    require('://' not in (_FLAGS.workdir or ''), '--workdir', _FLAGS.workdir, 'a directory, as of a mounted bucket')
    workdir = Path(_FLAGS.workdir or f'runs/{(recipes or ["defaults"])[-1]}').expanduser()
    logging.info('workdir %s', workdir)
    if _FLAGS.workers or _FLAGS.worker_index is not None:
        _describe_cluster(_FLAGS.workers, _FLAGS.worker_index)
    strategy = loaded.build_strategy()
    signals.install()
    try:
        name, data_dir, prepare = _find_data(loaded.data)
        eval_source = input_pipeline.open_source(name, data_dir, loaded.data.eval_split, prepare=prepare)
        needs_train = _FLAGS.mode != 'eval' or loaded.train.eval_precise_batch_norm
        train_source = input_pipeline.open_source(name, data_dir, loaded.data.train_split) if needs_train else None
        if needs_train and loaded.data.cache:
            train_source = train_source.cached()
        common = {'strategy': strategy, 'train_source': train_source, 'train_dataset': loaded.train_dataset}
        both = common | {'eval_source': eval_source, 'eval_dataset': loaded.eval_dataset, 'workdir': workdir}
        if _FLAGS.mode == 'benchmark':
            print(json.dumps(benchmark.benchmark(loaded.train, loaded.data, **common)))
        elif _FLAGS.mode == 'eval':
            print(json.dumps(evaluate.evaluate_checkpoint(loaded.train, loaded.data, loaded.evaluate, **both)))
        else:
            loop.train(loaded.train, loaded.data, fingerprint={**loaded.fingerprint, 'data.name': repr(name)},
                       write_config=loaded.write, should_stop=signals, **both)
    except tf.errors.OpError as error:
        leave_to_try_again(strategy, error)
        raise


def _describe_cluster(workers: list[str], index: int | None) -> None:
    """Sets TF_CONFIG, where TensorFlow's own servers look too."""
    require(not os.environ.get('TF_CONFIG'), '--workers', ','.join(workers), 'left out where TF_CONFIG is set')
    require(all(re.fullmatch(r'[^:\s]+:\d+', worker) for worker in workers), '--workers', ','.join(workers),
            'as alpha:2222,beta:2222')
    require(index is not None and 0 <= index < len(workers), '--worker_index', index,
            f'in 0..{len(workers) - 1}' if workers else 'left out without --workers')
    os.environ['TF_CONFIG'] = json.dumps({'cluster': {'worker': workers}, 'task': {'type': 'worker', 'index': index}})


def _find_data(data) -> tuple[str, str, bool]:
    """(data source name, directory, whether TFDS may download it)."""
    general = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    if _FLAGS.data_dir is None and data.default_dir and data.otherwise and not os.path.isdir(data.default_dir):
        logging.warning('no %s: taking %s in %s, which TFDS downloads', data.default_dir, data.otherwise, general)
        return data.otherwise, general, True
    return data.name, _FLAGS.data_dir or data.default_dir or general, False


def import_tensorflow() -> None:
    """Imports TensorFlow without the lines its C++ writes to stderr, unless it fails or TF_CPP_MIN_LOG_LEVEL is 0."""
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')  # the default on some CPUs only, faster on all tried
    if os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2') == '0':
        return
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            import tensorflow as tf
            tf.config.list_physical_devices()
            captured.truncate(captured.seek(0))
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            os.write(2, captured.read())


if __name__ == '__main__':
    if 'GLIBC_TUNABLES' not in os.environ:  # read as a process starts: 2 MB pages make steps 1.03 to 1.06 as fast
        os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    exit_code = main(sys.argv)
    gc.freeze()  # or the interpreter, on its way out, searches for seconds through all that was traced
    sys.exit(exit_code)
