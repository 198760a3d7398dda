"""Exit codes and the one line of a user's error, in processes of their own where streams and signals matter."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmoe.report.command import one_line, run_command

REPOSITORY = Path(__file__).resolve().parents[2]
BEGINNING = "import os, signal, sys, time\nfrom jaxmoe.report.command import run_command\ndef run():\n    "


def shell(body: str, ending: str = "", env: str = "") -> subprocess.CompletedProcess:
    """A command whose work is `body`, with what a shell may put around it."""
    code = f"{BEGINNING}{body}\nsys.exit(run_command(run))"
    line = f"PYTHONUNBUFFERED= {env} '{sys.executable}' -c \"$1\" {ending}"
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}", "bash", code], cwd=REPOSITORY, capture_output=True, timeout=60
    )


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), "a/b: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_users_error(capsys, error, line):
    assert one_line(error) == line
    assert run_command(raising(error)) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_command(raising(KeyError("x")))


def test_nothing_wrong(capsys):
    assert run_command(lambda: print("done")) == 0
    assert capsys.readouterr() == ("done\n", "")


def test_interrupt():
    """Python's own handler is set anew: tests that a shell runs in the background inherit that the signal is ignored."""
    done = shell("signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT); time.sleep(30)")
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"interrupted\n")


def test_reader_that_has_gone():
    done = shell("for i in range(100000): print(i)", "| head -n 1")
    assert (done.returncode, done.stdout, done.stderr) == (141, b"0\n", b"")


def test_output_that_takes_nothing():
    done = shell("print('lost')", "> /dev/full")
    assert (done.returncode, done.stderr) == (2, b"error: [Errno 28] No space left on device\n")


def test_error_while_the_output_takes_nothing():
    """What was printed before is still in the buffer when the error comes."""
    done = shell("print('lost'); raise ValueError('first')", "> /dev/full")
    assert (done.returncode, done.stderr) == (2, b"error: first\n")


def test_characters_that_the_terminal_does_not_have():
    done = shell("print('a\\u00e9\\ufffd')", env="PYTHONIOENCODING=ascii")
    assert (done.returncode, done.stdout) == (0, b"a??\n")
