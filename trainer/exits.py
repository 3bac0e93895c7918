"""How a process ends itself from any thread, whatever the others wait for. Lowest of all: every module may have to."""
import errno
import os
import sys
from typing import NoReturn, TextIO

EXIT_STOPPED, EXIT_PEER_LOST = 42, 75


def leave(message: str) -> NoReturn:
    """One line, and the end of the process: whatever waits for the lost peer would wait for ever."""
    end(EXIT_PEER_LOST, f'error: {message}; nothing new was saved: run the same command again')


def end(code: int, message: str) -> NoReturn:
    """Ends the process at once with this exit code."""
    show(f'\n{message}\n', sys.stderr)
    sys.stdout.flush()
    os._exit(code)


def show(text: str, stream: TextIO) -> None:
    """Writes to a terminal or a pipe, if anybody reads it."""
    try:
        print(text, end='', file=stream, flush=True)
    except OSError as error:  # who read it has ended, as `tee` does on Ctrl-C: the run goes on to its checkpoint
        if error.errno != errno.ENOSPC:  # or it is a file on a disk that is full, which may have room again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
