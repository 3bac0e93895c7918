"""Telemetry: one report(step, {tag: value}) to metrics.jsonl, TensorBoard, and a progress line on stderr."""
import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

import tensorflow as tf

from trainer.exits import show


class Telemetry:
    """Owns a run's open files, which continue those in the workdir after `resumed_step`; without a workdir, silent."""

    def __init__(self, workdir: Path | None, resumed_step: int, *, clock: Callable[[], float] = time.time,
                 stream: TextIO | None = None):
        self._workdir, self._clock, self._stream = workdir, clock, stream or sys.stderr
        self._live_width, self._files = 0, contextlib.ExitStack()
        self.go_back(resumed_step)

    def go_back(self, step: int) -> None:
        """Takes back what was reported of later steps."""
        if self._workdir is None:
            return
        self._files.close()
        self._resumed_step, self._writers, self._unwritten = step, {}, b''
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / 'metrics.jsonl'
        kept = ''.join(line for line, found in read_json_lines(path, 'step') if found['step'] <= step).encode()
        if path.exists() and kept != path.read_bytes():  # without steps that are made again, or a line cut by a kill
            aside = path.with_suffix('.writing')
            aside.write_bytes(kept)
            aside.replace(path)
        self._file = self._files.enter_context(open(path, 'ab', buffering=0))

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes tags of one kind ('train/...', 'eval/...') for one step. Raises ValueError: none, or several."""
        kinds = {'train' if tag.startswith('train/') else 'eval' for tag in metrics}
        if len(kinds) != 1:
            raise ValueError(f'one report is of train tags or of eval tags, not {sorted(metrics)}')
        if self._workdir is None:
            return
        finite = {tag: value if math.isfinite(value) else None for tag, value in metrics.items()}  # JSON has no NaN
        self._unwritten += json.dumps({'step': step, 'time': self._clock(), **finite}).encode() + b'\n'
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten):]
            with self._writer(kinds.pop()).as_default():
                for tag, value in metrics.items():
                    tf.summary.scalar(tag, value, step)
        except (OSError, tf.errors.OpError) as error:
            logging.warning('CANNOT WRITE a report in %s: %s; training goes on, and the next report completes '
                            'metrics.jsonl', self._workdir, str(error).splitlines()[0])

    def progress(self, text: str, *, is_lasting: bool) -> None:
        """Shows one line: on a terminal over the last one unless `is_lasting`; elsewhere only if it is."""
        is_live = self._stream.isatty()  # no more after it has hung up
        if self._workdir is None or not (is_live or is_lasting):
            return
        if not is_lasting:
            width = os.get_terminal_size(self._stream.fileno()).columns or 80  # 0 where nobody set a size
            text = text[:max(1, width - 1)]
        shown, self._live_width = text.ljust(self._live_width), 0 if is_lasting else len(text)
        show(('\r' if is_live else '') + shown + ('\n' if is_lasting else ''), self._stream)

    def close(self) -> None:
        """Flushes and closes everything; leaves the terminal on a new line."""
        if self._live_width:
            show('\n', self._stream)
        self._files.close()

    def _writer(self, kind: str) -> tf.summary.SummaryWriter:
        if kind not in self._writers:
            with tf.Graph().as_default():  # TensorBoard drops what a run that ended later had written for later steps
                with tf.compat.v1.summary.FileWriter(str(self._workdir / kind)) as writer:
                    writer.add_session_log(tf.compat.v1.SessionLog(status='START'), self._resumed_step + 1)
            self._writers[kind] = tf.summary.create_file_writer(str(self._workdir / kind))
            self._files.enter_context(contextlib.suppress(tf.errors.OpError))  # in closing it: report() has said so
            self._files.callback(self._writers[kind].close)
        return self._writers[kind]


def progress_line(*, step: int, num_steps: int, metrics: Mapping[str, float], eta_secs: float) -> str:
    """step, loss, top-1, img/s, data wait, time left: one line of fixed order."""
    hours, minutes = int(eta_secs) // 3600, time.strftime('%M:%S', time.gmtime(eta_secs))
    return (f'[{"#" * round(20 * step / num_steps):<20}] step {step}/{num_steps}  loss {metrics["train/loss"]:.3f}  '
            f'top-1 {100 * metrics["train/top1"]:.1f} %  {metrics["train/images_per_sec"]:.0f} img/s  '
            f'data wait {100 * metrics["train/data_wait_fraction"]:.0f} %  ETA {hours}:{minutes}')


def train_metrics(sums: Mapping[str, float], learning_rate: float) -> dict[str, float]:
    """What is reported of the sums that `step.make_train_loop` gives, and of their 'steps' and 'secs'."""
    examples = sums['examples'] or math.nan  # none if every step was skipped
    return {'train/loss': sums['loss'] / examples, 'train/top1': sums['top1'] / examples,
            'train/learning_rate': learning_rate, 'train/images_per_sec': sums['seen'] / sums['secs'],
            'train/data_wait_fraction': min(1.0, sums['data_wait_secs'] / sums['secs']),
            'train/grad_norm': sums['grad_norm'] / max(sums['steps'] - sums['skipped'], 1),
            'train/skipped_steps': sums['skipped']}


def eval_line(step: int, results: Mapping[str, float], secs: float) -> str:
    """What is shown of an evaluation."""
    parts = [f'{kind} top-1 {100 * results[f"{kind}/top1"]:.2f} %  top-5 {100 * results[f"{kind}/top5"]:.2f} %  '
             f'loss {results[f"{kind}/loss"]:.4f}' for kind in sorted({tag.split('/')[0] for tag in results})]
    return f'step {step}  {"  ".join(parts)}  ({results["eval/examples"]} examples, {secs:.1f} s)'


def read_json_lines(path: Path, key: str) -> list[tuple[str, dict]]:
    """The lines that hold an object with an integer `key`, and what they say; without one that was cut short."""
    lines = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(ValueError):
            found = json.loads(line) if line.endswith('\n') else None
            lines += [(line, found)] if isinstance(found, dict) and isinstance(found.get(key), int) else []
    return lines
