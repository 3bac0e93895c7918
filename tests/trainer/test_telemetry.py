"""Where numbers go: metrics.jsonl as documented, event files as TensorBoard reads them, terminals and pipes."""

import fcntl
import io
import json
import math
import os
import select
import struct
import termios
import time

import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from trainer.telemetry import Telemetry, progress_line

TRAIN = {'train/loss': 2.5, 'train/top1': 0.25, 'train/images_per_sec': 70.0}
EVAL = {'eval/loss': 1.5, 'eval/top1': 0.5, 'eval/examples': 10000, 'eval_ema/top1': 0.75}


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / 'runs' / 'x'


def build(workdir, resumed_step=0, now=1234.5):
    return Telemetry(workdir, resumed_step, clock=lambda: now, stream=io.StringIO())


def lines(workdir):
    """Strict JSON: NaN and Infinity, which Python would read, are errors."""
    def refuse(constant):
        raise ValueError(constant)

    text = (workdir / 'metrics.jsonl').read_text()
    assert text == '' or text.endswith('\n')
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events(directory):
    """{tag: [(step, value), ...]} as TensorBoard has it."""
    accumulator = EventAccumulator(str(directory), tensor_size_guidance={'scalars': 0})
    accumulator.Reload()
    return {tag: [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in accumulator.Tensors(tag)]
            for tag in accumulator.Tags()['tensors']}


def test_one_line_a_report(workdir):
    telemetry = build(workdir)
    telemetry.report(100, TRAIN)
    telemetry.report(100, EVAL)
    telemetry.close()
    assert lines(workdir) == [{'step': 100, 'time': 1234.5, **TRAIN}, {'step': 100, 'time': 1234.5, **EVAL}]


def test_a_report_is_there_before_the_run_ends(workdir):
    """A run that is killed later keeps it, in the event files too."""
    telemetry = build(workdir)
    telemetry.report(100, TRAIN)
    assert [line['step'] for line in lines(workdir)] == [100]
    assert events(workdir / 'train')['train/loss'] == [(100, 2.5)]
    telemetry.close()


@pytest.mark.parametrize('metrics', [{}, {**TRAIN, **EVAL}])
def test_train_and_eval_tags_do_not_mix(workdir, metrics):
    telemetry = build(workdir)
    with pytest.raises(ValueError, match='train tags or of eval tags'):
        telemetry.report(1, metrics)
    telemetry.close()
    assert lines(workdir) == []


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_null(workdir, value):
    telemetry = build(workdir)
    telemetry.report(1, {'train/loss': value, 'train/top1': 0.0})
    telemetry.close()
    assert lines(workdir) == [{'step': 1, 'time': 1234.5, 'train/loss': None, 'train/top1': 0.0}]
    [(_, shown)] = events(workdir / 'train')['train/loss']
    assert shown == value or math.isnan(shown) and math.isnan(value)


def test_tensorboard_reads_the_same_tags_and_values(workdir):
    telemetry = build(workdir)
    for step in (100, 200):
        telemetry.report(step, {tag: value + step for tag, value in TRAIN.items()})
    telemetry.report(200, EVAL)
    telemetry.close()
    assert events(workdir / 'train') == {tag: [(100, value + 100), (200, value + 200)] for tag, value in TRAIN.items()}
    assert events(workdir / 'eval') == {tag: [(200, float(value))] for tag, value in EVAL.items()}


def test_lines_after_the_resumed_step_are_made_again(workdir):
    first = build(workdir)
    for step in (10, 20, 30):
        first.report(step, TRAIN)
        first.report(step, EVAL)
    first.close()
    time.sleep(1.1)  # event files are read in the order of their names, which hold whole seconds
    second = build(workdir, resumed_step=20)
    assert [line['step'] for line in lines(workdir)] == [10, 10, 20, 20]
    second.report(30, TRAIN)
    second.close()
    assert [line['step'] for line in lines(workdir)] == [10, 10, 20, 20, 30]
    # TensorBoard drops what stood after the resumed step: nothing stands twice.
    assert [step for step, _ in events(workdir / 'train')['train/loss']] == [10, 20, 30]
    assert sorted(path.name for path in workdir.iterdir()) == ['eval', 'metrics.jsonl', 'train']


def test_a_run_that_starts_over_starts_an_empty_file(workdir):
    first = build(workdir)
    first.report(10, TRAIN)
    first.close()
    build(workdir, resumed_step=0).close()
    assert lines(workdir) == []


@pytest.mark.parametrize('torn', [b'{"step": 20, "ti', b'{"step": 20}', b'\xff\x00\xfe', b'\0' * 50, b'[1]\n', b'{}\n'])
def test_a_torn_last_line_is_taken_out(workdir, torn):
    """A kill cuts a line short; a power failure may leave anything."""
    first = build(workdir)
    first.report(10, TRAIN)
    first.close()
    with open(workdir / 'metrics.jsonl', 'ab') as file:
        file.write(torn)
    second = build(workdir, resumed_step=20)
    second.report(30, TRAIN)
    second.close()
    assert [line['step'] for line in lines(workdir)] == [10, 30]


@pytest.fixture
def terminal():
    """(stream, read(), set_size(columns)): a stream on a pseudo-terminal, and what has come out at its other end."""
    master, slave = os.openpty()
    stream = os.fdopen(slave, 'w')

    def set_size(columns):
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))

    def read():
        stream.flush()
        written = b''
        while select.select([master], [], [], 0)[0]:
            written += os.read(master, 65536)
        return written.decode()

    set_size(40)
    yield stream, read, set_size
    stream.close()
    os.close(master)


def test_a_terminal_that_hangs_up_does_not_end_the_run(workdir):
    master, slave = os.openpty()
    with os.fdopen(slave, 'w') as stream:
        telemetry = Telemetry(workdir, 0, stream=stream)
        telemetry.progress('a bar', is_lasting=False)
        os.close(master)
        for is_lasting in (False, True, False):
            telemetry.progress('the next', is_lasting=is_lasting)
        telemetry.close()


def test_a_log_on_a_full_disk_is_written_again_when_it_has_room(workdir, tmp_path):
    stream = open('/dev/full', 'w', encoding='utf-8')
    telemetry = Telemetry(workdir, 0, stream=stream)
    telemetry.progress('lost for now', is_lasting=True)
    with open(tmp_path / 'log', 'w', encoding='utf-8') as log:
        os.dup2(log.fileno(), stream.fileno())  # there is room
    telemetry.progress('the next', is_lasting=True)
    telemetry.close()
    stream.close()
    assert (tmp_path / 'log').read_text().splitlines()[-1] == 'the next'


def screen(written):
    """The lines that a terminal shows: a carriage return goes back to the first column, text overwrites."""
    rows, column = [''], 0
    for character in written:
        if character == '\n':
            rows.append('')
        elif character == '\r':
            column = 0
        else:
            rows[-1] = rows[-1][:column].ljust(column) + character + rows[-1][column + 1:]
            column += 1
    return [row.rstrip() for row in rows]


def test_a_terminal_shows_one_line_that_moves(workdir, terminal):
    stream, read, _ = terminal
    telemetry = Telemetry(workdir, 0, stream=stream)
    telemetry.progress('step 100 of 1000', is_lasting=False)
    telemetry.progress('step 200', is_lasting=False)
    written = read()
    assert screen(written) == ['step 200']
    telemetry.progress('eval top-1 50 %', is_lasting=True)
    telemetry.progress('step 300', is_lasting=False)
    written += read()
    assert screen(written) == ['eval top-1 50 %', 'step 300']
    telemetry.close()
    written += read()
    assert screen(written) == ['eval top-1 50 %', 'step 300', '']


def test_a_moving_line_never_wraps(workdir, terminal):
    stream, read, set_size = terminal
    telemetry = Telemetry(workdir, 0, stream=stream)
    telemetry.progress('x' * 100, is_lasting=False)
    assert screen(read()) == ['x' * 39]
    set_size(20)  # the window is made smaller
    telemetry.progress('y' * 100, is_lasting=False)
    assert screen(read())[0].count('y') == 19
    telemetry.close()


def test_what_lasts_is_never_cut(workdir, terminal):
    stream, read, _ = terminal
    telemetry = Telemetry(workdir, 0, stream=stream)
    telemetry.progress('x' * 100, is_lasting=True)
    telemetry.close()
    assert screen(read()) == ['x' * 100, '']


def test_a_terminal_of_unknown_size_has_eighty_columns(workdir, terminal):
    stream, read, set_size = terminal
    set_size(0)
    telemetry = Telemetry(workdir, 0, stream=stream)
    telemetry.progress('x' * 100, is_lasting=False)
    assert screen(read()) == ['x' * 79]
    telemetry.close()


def test_a_pipe_gets_whole_lines_only(workdir):
    source, sink = os.pipe()
    with os.fdopen(sink, 'w') as stream:
        telemetry = Telemetry(workdir, 0, stream=stream)
        telemetry.progress('step 100', is_lasting=False)
        telemetry.progress('step 200', is_lasting=True)
        telemetry.progress('step 300', is_lasting=False)
        telemetry.close()
    with os.fdopen(source) as stream:
        assert stream.read() == 'step 200\n'


def test_the_progress_line_has_all_that_one_looks_for():
    metrics = {'train/loss': 2.34567, 'train/top1': 0.4321, 'train/images_per_sec': 70.4,
               'train/data_wait_fraction': 0.034}
    line = progress_line(step=250, num_steps=1000, metrics=metrics, eta_secs=3725.9)
    assert line == ('[#####               ] step 250/1000  loss 2.346  top-1 43.2 %  70 img/s  data wait 3 %  '
                    'ETA 1:02:05')


def test_the_bar_is_full_at_the_end():
    metrics = {'train/loss': math.nan, 'train/top1': 0.0, 'train/images_per_sec': 1e4, 'train/data_wait_fraction': 1.0}
    line = progress_line(step=7, num_steps=7, metrics=metrics, eta_secs=0.0)
    assert line.startswith('[' + 20 * '#' + '] step 7/7  loss nan')
    assert line.endswith('ETA 0:00:00')
