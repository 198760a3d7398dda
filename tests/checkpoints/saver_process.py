"""Processes that save and end badly: `saver_process.py kills ROOT COUNT` and `saver_process.py exit ROOT`.

`kills` starts children that save continually, kills each at a random moment (every other one after its first save), and says "killed STEP", the
last step of which the child had heard that it is saved; it goes on when it gets a line. `exit` says what a bounded save took of memory, begins
another, and is interrupted.
"""

import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np


def tree_of(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {f"leaf_{i}": rng.integers(0, 255, (64, 1 << 10)).astype(np.uint8).view(np.float32) for i in range(6)}


def save_forever(root: str, pipe: int) -> None:
    import jax

    from checkpoints import trees
    from checkpoints.saver import AsyncSaver, latest

    with AsyncSaver(root, host_bytes=1 << 17) as saver:
        found = latest(root)
        step = 0 if found is None else trees.read_tree(found).step + 1
        os.write(pipe, b"begun\n")
        while True:
            saver.save(step, jax.tree.map(jax.numpy.asarray, tree_of(step)))
            saver.wait()
            os.write(pipe, f"{step}\n".encode())
            step += 1


def kills(root: str, count: str) -> None:
    import jax  # noqa: F401  (imported once; a child only starts its backend)

    import checkpoints.saver  # noqa: F401

    for i in range(int(count)):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            save_forever(root, write)
        os.close(write)
        said = os.read(read, 6)
        said += os.read(read, 100) if i % 2 else b""
        time.sleep(random.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(read, 1 << 16):
            said += more
        os.close(read)
        steps = [int(line) for line in said.split(b"\n")[1:-1]]
        print("killed", steps[-1] if steps else -1, flush=True)
        sys.stdin.readline()


def memory(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) << 10


def exit_interrupted(root: str) -> None:
    import jax.numpy as jnp

    from checkpoints.saver import AsyncSaver

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has commands in the background ignore it, and Python keeps to that
    tree = {f"leaf_{i}": jnp.full((8 << 20,), float(i)) for i in range(4)}  # 128 MB
    with AsyncSaver(root, host_bytes=16 << 20) as saver:
        saver.save(0, {"small": jnp.ones(1 << 20)})
        saver.wait()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
        saver.save(1, tree)
        saver.before_donation()  # copies, rather than what it writes from where it is
        saver.wait()
        print(memory("VmHWM") - before, saver.peak_bytes, flush=True)
        saver.save(2, tree)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    {"kills": kills, "exit": exit_interrupted}[sys.argv[1]](*sys.argv[2:])
