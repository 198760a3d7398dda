"""How a command line ends: a user's error is one line on standard error and exit code 2, never a traceback.

Knows exceptions and streams; imports neither jax nor anything of ours.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
READER_GONE = 141  # 128 + SIGPIPE


def run_command(run: Callable[[], None]) -> int:
    """Runs a command line's work and gives its exit code.

    Args:
        run: the work. Its ValueErrors and OSErrors are the user's: a wrong value, a damaged file, a full disk. Anything else is a fault of
            ours and keeps its traceback.

    Returns:
        0; 2 after `error: ...` on standard error; 130 after an interrupt; 141 where whoever read standard output has gone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows "?" rather than ending a long run
    try:
        run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return READER_GONE
    except (ValueError, OSError) as error:
        _drop_output()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR
    return 0


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; an OSError's begins with the file that it is about."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _drop_output() -> None:
    """Where standard output takes nothing any more, throws away what it still holds: Python would try again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
