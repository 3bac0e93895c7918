"""workdir/bad_examples.jsonl: the examples that cannot be used. Their rows are masked and count in nothing."""
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import input_pipeline
from trainer.recipe import ConfigError
from trainer.telemetry import read_json_lines


class BadExamples:
    """Those of one source: what the input pipeline finds, written down once each when their rows have been trained on.

    `path` is the file, None: nothing is written; `budget` the part of the examples that may be bad; take_turns(action)
    calls it on one worker after the other, for all write to one file.
    """

    def __init__(self, path: Path | None, budget: float, take_turns: Callable[[Callable[[], None]], None],
                 source: input_pipeline.Source):
        self._path, self._source, self._budget, self._take_turns = path, source, budget, take_turns
        self._found: list[tuple[int, int]] = []  # threads of the input pipeline append to it
        self._known = self._read()

    def found(self, position: int, index: int) -> None:
        """What the input pipeline calls, ahead of the steps: the example at `position` of the stream is bad."""
        self._found.append((position, index))

    def settle(self, end: float = math.inf) -> int:
        """Writes down those before position `end` and counts the known; all workers together. ConfigError: too many."""
        due = sorted(entry for entry in self._found[:] if entry[0] < end)
        for entry in due:
            self._found.remove(entry)
        self._take_turns(lambda: self._write([index for _, index in due]))
        self._known |= self._read()
        if (count := len(self._known)) > self._budget * len(self._source):
            some = '; '.join(f'{self._source.where(i)} (example {i}): {self._known[i]}' for i in list(self._known)[:3])
            raise ConfigError(f'{count} of the {len(self._source)} examples of {self._source.name} are bad, more than '
                              f'train.bad_example_budget = {self._budget:g} of them'
                              + (f', all named in {self._path}' if self._path else '') + f': {some}')
        return count

    def metrics(self) -> dict[str, int]:
        """{'train/bad_examples': how many are known}, if there are any."""
        return {'train/bad_examples': len(self._known)} if self._known else {}

    def _write(self, indices: list[int]) -> None:
        new = {index: input_pipeline.why_bad(self._source, index) for index in indices if index not in self._known}
        for index, reason in new.items():
            logging.warning('%s (example %d) is masked: %s', self._source.where(index), index, reason)
        self._known |= new
        if self._path and new:
            try:
                with open(self._path, 'a', encoding='utf-8') as file:
                    file.writelines(json.dumps({'source': self._source.name, 'index': index, 'reason': reason}) + '\n'
                                    for index, reason in new.items())
            except OSError as error:
                logging.warning('%s cannot be written: %s', self._path, error)

    def _read(self) -> dict[int, str]:
        entries = [entry for _, entry in read_json_lines(self._path, 'index')] if self._path else []
        return {entry['index']: entry.get('reason') for entry in entries if entry.get('source') == self._source.name}
