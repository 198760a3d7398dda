"""Kills a program at a chosen system call, or makes that call fail: for tests of what is on the disk afterwards.

    with faults.Server("checkpoints.convert") as server:
        straight = server.run("checkpoints.convert:convert", [hf, out], below=folder)
        run = server.run("checkpoints.convert:convert", [hf, out], below=folder, fault=Fault(17))             # SIGKILL instead of call 17
        run = server.run("checkpoints.convert:convert", [hf, out], below=folder, fault=Fault(3, "ENOSPC", forever=True, kinds=("write",)))

Any importable "module:function" with JSON arguments will do. It runs in a process of its own, forked from a server that has imported the named
modules once; the server traces it (ptrace; Linux on x86_64 or aarch64; neither root nor a compiler is needed). Calls are counted over all threads
and child processes, from 1. A call counts if it changes files below `below`:

    kind       system calls
    'open'     open, openat, openat2 with O_CREAT, O_TRUNC or O_TMPFILE; creat
    'write'    write, pwrite, writev, pwritev, sendfile, copy_file_range
    'sync'     fsync, fdatasync
    'truncate' truncate, ftruncate, fallocate
    'rename', 'link' (symlinks too), 'unlink', 'mkdir', 'rmdir'

so pipes, sockets, eventfds and terminals don't. Not seen: writes through mmap and io_uring, chmod and the like. The server must not have started what
doesn't survive a fork (thread pools of tensorstore, jax backends): let it import, not compute. This file knows nothing of checkpoints.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import importlib
import json
import os
import platform
import re
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Call:
    """A system call that changes the disk; `paths` are absolute, two of them where a name is moved or linked."""

    kind: str
    paths: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th (from 1) of the calls that are of `kinds` (all, if none is named) and have a path that matches `pattern` (a regular
    expression, searched for).

    `how`: 'kill' (SIGKILL; the call isn't made), 'kill after' (the call is made), 'kill torn' (a write writes the first half; another call isn't
    made), or the name of an errno such as 'ENOSPC' (the call isn't made and fails with it; `forever`: so do all that match from then on).
    """

    at: int
    how: str = "kill"
    forever: bool = False
    kinds: tuple[str, ...] = ()
    pattern: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """How a run ended: `outcome` is 'returned' (`value`: what it returned, None if that isn't JSON), 'raised' (`error`: the exception's class,
    `message` its text, `output` the traceback), 'killed' (by the fault), 'died' (otherwise) or 'hung' (past its time). `fired` counts the faults that
    happened, `calls` are those made until then and afterwards, the failed ones included; `output` is what it printed."""

    outcome: str
    value: Any
    error: str
    message: str
    output: str
    fired: int
    calls: tuple[Call, ...]
    seconds: float


class Server:
    """A fresh Python that has imported some modules and forks a traced process for each run. Close it, or use it in a `with`."""

    def __init__(self, *modules: str, python: str = sys.executable) -> None:
        """Starts it; nothing waits for the imports before the first run."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # One thread each: a library that starts threads when it is imported would have lost them after the fork.
        env = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
        command = [python, "-P", __file__, *modules]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        function: str,
        args: list | tuple = (),
        kwargs: dict | None = None,
        *,
        below: str | os.PathLike,
        fault: Fault | None = None,
        timeout: float = 60,
    ) -> Run:
        """Runs a function in a traced process and waits for its end.

        Args:
            function: "module:name".
            args, kwargs: JSON; a path becomes a string.
            below: the folder whose changes count.
            fault: None to count only.
            timeout: seconds; the process is killed then.
        """
        request = {
            "function": function,
            "args": list(args),
            "kwargs": kwargs or {},
            "below": os.path.realpath(below),
            "fault": dataclasses.asdict(fault) if fault else None,
            "timeout": timeout,
        }
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request, default=os.fspath) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError("the fault server ended; why is in its stderr above")
        reply = json.loads(line)
        return Run(**{**reply, "calls": tuple(Call(kind, tuple(paths)) for kind, paths in reply["calls"])})

    def close(self) -> None:
        """Ends the server, and with it whatever it runs."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.close()


# --- the kernel's numbers ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Where a system call has what: arguments are numbered from 0; `paths` are pairs: argument of the folder's fd (or None) and of the string."""

    kind: str
    x86_64: int | None
    aarch64: int | None
    fd: int | None = None
    paths: tuple[tuple[int | None, int], ...] = ()
    flags: int | None = None


_SHAPES = (
    _Shape("write", 1, 64, fd=0),
    _Shape("write", 18, 68, fd=0),  # pwrite64
    _Shape("write", 20, 66, fd=0),  # writev
    _Shape("write", 296, 70, fd=0),  # pwritev
    _Shape("write", 328, 287, fd=0),  # pwritev2
    _Shape("write", 40, 71, fd=0),  # sendfile
    _Shape("write", 326, 285, fd=2),  # copy_file_range
    _Shape("sync", 74, 82, fd=0),
    _Shape("sync", 75, 83, fd=0),  # fdatasync
    _Shape("truncate", 76, 45, paths=((None, 0),)),
    _Shape("truncate", 77, 46, fd=0),
    _Shape("truncate", 285, 47, fd=0),  # fallocate
    _Shape("rename", 82, None, paths=((None, 0), (None, 1))),
    _Shape("rename", 264, 38, paths=((0, 1), (2, 3))),
    _Shape("rename", 316, 276, paths=((0, 1), (2, 3))),  # renameat2
    _Shape("link", 86, None, paths=((None, 0), (None, 1))),
    _Shape("link", 265, 37, paths=((0, 1), (2, 3))),
    _Shape("link", 88, None, paths=((None, 1),)),  # symlink: the other string is content
    _Shape("link", 266, 36, paths=((1, 2),)),  # symlinkat
    _Shape("unlink", 87, None, paths=((None, 0),)),
    _Shape("unlink", 263, 35, paths=((0, 1),), flags=2),
    _Shape("rmdir", 84, None, paths=((None, 0),)),
    _Shape("mkdir", 83, None, paths=((None, 0),)),
    _Shape("mkdir", 258, 34, paths=((0, 1),)),
    _Shape("open", 85, None, paths=((None, 0),)),  # creat
    _Shape("open", 2, None, paths=((None, 0),), flags=1),
    _Shape("open", 257, 56, paths=((0, 1),), flags=2),
    _Shape("open", 437, 437, paths=((0, 1),)),  # openat2: its flags are in memory
)
_OPENAT2 = 437
_MAKING = os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)
_AT_REMOVEDIR = 0x200
_AT_FDCWD = -100

_MACHINE = platform.machine()
_X86 = _MACHINE == "x86_64"
_AUDIT_ARCH = 0xC000003E if _X86 else 0xC00000B7
_CALLS = {getattr(shape, _MACHINE): shape for shape in _SHAPES if getattr(shape, _MACHINE, None) is not None}
_PLAIN_WRITES, _VECTOR_WRITES = ((1, 18), (20, 296, 328)) if _X86 else ((64, 68), (66, 70, 287))
# Places in the registers as PTRACE_GETREGSET gives them, 8 bytes each.
_REGISTERS, _NR, _RESULT, _ARGS = (27, 15, 10, (14, 13, 12, 7, 9, 8)) if _X86 else (34, 8, 0, (0, 1, 2, 3, 4, 5))

_CONT, _SYSCALL, _GETREGSET, _SETREGSET, _SEIZE = 7, 24, 0x4204, 0x4205, 0x4206
_NT_PRSTATUS, _NT_ARM_SYSTEM_CALL = 1, 0x404
# TRACESYSGOOD, TRACEFORK, TRACEVFORK, TRACECLONE, TRACEEXEC, TRACESECCOMP, EXITKILL
_OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x80 | 0x100000
_EVENT_SECCOMP = 7
_WALL = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


class _Block(ctypes.Structure):
    """struct iovec."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def _stop_at_calls() -> None:
    """Makes this process, and all that comes of it, stop for its tracer at calls that may count; others cost nothing."""
    load, equal, any_of, give = 0x20, 0x15, 0x45, 0x06
    allow, trace, kill = 0x7FFF0000, 0x7FF00000, 0x80000000

    def instruction(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    program = [instruction(load, 4), instruction(equal, _AUDIT_ARCH, 1, 0), instruction(give, kill), instruction(load, 0)]
    for number, shape in _CALLS.items():
        if shape.kind == "open" and shape.flags is not None:  # else every import would stop
            program += [instruction(equal, number, 0, 4), instruction(load, 16 + 8 * shape.flags), instruction(any_of, _MAKING, 0, 1)]
            program += [instruction(give, trace), instruction(give, allow)]
        else:
            program += [instruction(equal, number, 0, 1), instruction(give, trace)]
    code = b"".join([*program, instruction(give, allow)])
    held = ctypes.create_string_buffer(code, len(code))
    filter_ = _Program(len(code) // 8, ctypes.addressof(held))
    if _libc.prctl(38, 1, 0, 0, 0) or _libc.prctl(22, 2, ctypes.addressof(filter_), 0, 0):  # no new privileges; seccomp filter
        raise OSError(ctypes.get_errno(), "the seccomp filter was refused")


def _ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, tid, address, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace request {request:#x}: {os.strerror(ctypes.get_errno())}")


def _regset(request: int, tid: int, kind: int, buffer: Any) -> None:
    block = _Block(ctypes.addressof(buffer), ctypes.sizeof(buffer))
    _ptrace(request, tid, kind, ctypes.addressof(block))


class _Stopped:
    """A thread that is about to make a system call."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self._registers = (ctypes.c_uint64 * _REGISTERS)()
        _regset(_GETREGSET, tid, _NT_PRSTATUS, self._registers)
        self.number = int(self._registers[_NR])

    def argument(self, i: int) -> int:
        return int(self._registers[_ARGS[i]])

    def describe(self) -> Call | None:
        """The call; None if it won't change the disk."""
        shape = _CALLS[self.number]
        if self.number == _OPENAT2 and not int.from_bytes(self._memory(self.argument(2), 8), "little") & _MAKING:
            return None
        removes = shape.kind == "unlink" and shape.flags is not None and self.argument(shape.flags) & _AT_REMOVEDIR
        kind = "rmdir" if removes else shape.kind
        if shape.fd is not None:
            return Call(kind, (self._link(f"fd/{ctypes.c_int(self.argument(shape.fd)).value}"),))
        return Call(kind, tuple(self._path(folder, name) for folder, name in shape.paths))

    def fail(self, error: int) -> None:
        """The call will not be made; it returns -error."""
        self._registers[_RESULT] = ctypes.c_uint64(-error).value
        if _X86:
            self._registers[_NR] = ctypes.c_uint64(-1).value
        else:
            _regset(_SETREGSET, self.tid, _NT_ARM_SYSTEM_CALL, ctypes.c_int(-1))
        _regset(_SETREGSET, self.tid, _NT_PRSTATUS, self._registers)

    def halve(self) -> bool:
        """Makes a write write the first half of its (first block of) data; False if it isn't a write of memory."""
        if self.number in _PLAIN_WRITES:
            self._registers[_ARGS[2]] //= 2
        elif self.number in _VECTOR_WRITES:
            address, length = struct.unpack("QQ", self._memory(self.argument(1), 16))
            self._memory(self.argument(1), struct.pack("QQ", address, length // 2))
            self._registers[_ARGS[2]] = 1
        else:
            return False
        _regset(_SETREGSET, self.tid, _NT_PRSTATUS, self._registers)
        return True

    def _path(self, folder: int | None, name: int) -> str:
        text = os.fsdecode(self._string(self.argument(name)))
        at = _AT_FDCWD if folder is None else ctypes.c_int(self.argument(folder)).value
        path = os.path.join(self._link("cwd" if at == _AT_FDCWD else f"fd/{at}"), text.rstrip("/"))
        return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))  # the last part itself is what is changed

    def _link(self, name: str) -> str:
        try:
            return os.readlink(f"/proc/{self.tid}/{name}")
        except OSError:  # a closed fd: the call will fail by itself
            return ""

    def _string(self, address: int) -> bytes:
        text = b""
        while b"\0" not in text and len(text) < 4096:
            at = address + len(text)
            text += self._memory(at, 256 - at % 256)  # never across the end of a page
        return text.split(b"\0", 1)[0]

    def _memory(self, address: int, what: int | bytes) -> bytes:
        """Reads so many bytes, or writes these."""
        fd = os.open(f"/proc/{self.tid}/mem", os.O_RDONLY if isinstance(what, int) else os.O_WRONLY)
        try:
            if isinstance(what, int):
                return os.pread(fd, what, address)
            os.pwrite(fd, what, address)
            return what
        finally:
            os.close(fd)


# --- the server's side ------------------------------------------------------------------------------------------------


class _Hung(Exception):
    pass


class _Tracer:
    """Follows a process to its end, and makes the fault happen."""

    def __init__(self, pid: int, below: str, fault: Fault | None) -> None:
        self.calls: list[Call] = []
        self.fired = 0
        self.struck = False  # by a fault that kills
        self._pid, self._below, self._fault = pid, below, fault
        self._threads = {pid}
        self._matched = self._status = 0
        self._killed = False

    def follow(self) -> int:
        """Waits for the end of the process and of all that it started; gives its wait status."""
        try:
            while True:
                self._handle(*os.waitpid(-1, _WALL))
        except ChildProcessError:
            return self._status

    def kill(self) -> None:
        """Ends every thread; calls that they are about to make are not made."""
        self._killed = True
        for tid in self._threads:
            try:
                os.kill(tid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _handle(self, tid: int, status: int) -> None:
        if not os.WIFSTOPPED(status):
            self._threads.discard(tid)
            if tid == self._pid:
                self._status = status
                self.kill()  # its children
            return
        self._threads.add(tid)
        if self._killed:
            os.kill(tid, signal.SIGKILL)
            return
        event, number = status >> 16, os.WSTOPSIG(status)
        try:
            if event == _EVENT_SECCOMP:
                self._at_call(_Stopped(tid))
            if not self._killed:
                _ptrace(_CONT, tid, 0, 0 if event else number)
        except (ProcessLookupError, FileNotFoundError):  # it ended in the meantime, with another thread's exit
            pass

    def _at_call(self, stopped: _Stopped) -> None:
        call, fault = stopped.describe(), self._fault
        if call is None or not any(path == self._below or path.startswith(self._below + "/") for path in call.paths):
            return
        self.calls.append(call)
        if fault is None or (fault.kinds and call.kind not in fault.kinds) or not any(re.search(fault.pattern, path) for path in call.paths):
            return
        self._matched += 1
        if self._matched < fault.at or (self._matched > fault.at and not fault.forever):
            return
        self.fired += 1
        if not fault.how.startswith("kill"):
            stopped.fail(getattr(errno, fault.how))
            return
        if fault.how == "kill after" or (fault.how == "kill torn" and stopped.halve()):
            _ptrace(_SYSCALL, stopped.tid)
            ended = os.waitpid(stopped.tid, _WALL)
            if not os.WIFSTOPPED(ended[1]):
                self._handle(*ended)
        self.struck = True
        self.kill()


def _trace(request: dict) -> dict:
    """One run: forks, traces, and tells how it ended."""
    begun = time.monotonic()
    output, result = os.memfd_create("output"), os.memfd_create("result")
    ready_read, ready_write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads: imports alone started them
        pid = os.fork()
    if pid == 0:
        _child(request, ready_read, output, result)
    tracer = _Tracer(pid, request["below"], Fault(**request["fault"]) if request["fault"] else None)
    _ptrace(_SEIZE, pid, 0, _OPTIONS)
    os.write(ready_write, b"x")
    hung = False
    signal.setitimer(signal.ITIMER_REAL, request["timeout"])
    try:
        status = tracer.follow()
    except _Hung:
        hung = True
        tracer.kill()
        status = tracer.follow()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    told = {"outcome": "died", "value": None, "error": "", "message": "", **json.loads(_all_of(result) or "{}")}
    if hung:
        told["outcome"] = "hung"
    elif tracer.struck:
        told["outcome"] = "killed"
    elif told["outcome"] == "died":
        told["message"] = f"wait status {status:#x}"
    text = _all_of(output).decode(errors="replace")
    for fd in (output, result, ready_read, ready_write):
        os.close(fd)
    calls = [dataclasses.astuple(call) for call in tracer.calls]
    return {**told, "output": text, "fired": tracer.fired, "calls": calls, "seconds": time.monotonic() - begun}


def _all_of(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _child(request: dict, ready: int, output: int, result: int) -> None:
    """The traced process; it doesn't return."""
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd in (1, 2):
            os.dup2(output, fd)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.read(ready, 1)
        _stop_at_calls()
        told = _call(request)
        os.write(result, json.dumps(told, default=lambda _: None).encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(1)


def _call(request: dict) -> dict:
    try:
        function = _find(request["function"])
        return {"outcome": "returned", "value": function(*request["args"], **request["kwargs"])}
    except BaseException as error:
        traceback.print_exc()
        return {"outcome": "raised", "error": type(error).__name__, "message": str(error)}


def _find(name: str) -> Any:
    module, path = name.split(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _serve(modules: list[str]) -> None:
    """Answers requests, a line each, until its input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed by an import must not come between

    def hung(*_) -> None:
        raise _Hung

    signal.signal(signal.SIGALRM, hung)
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_trace(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
