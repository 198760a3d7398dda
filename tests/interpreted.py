"""Makes jax's interpreter of Mosaic GPU kernels compile a kernel's threads once, so that each test of those kernels takes seconds less.

The interpreter (jax 0.10.2 to 0.11.2) hands every thread of every block of a grid the same jaxpr, and each of them traces and compiles it for
itself. What a thread computes stays what it was: only the compiled program is shared. A jax with another interpreter keeps its own way.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import jax
import pytest

from tests import quick

KEPT = 8
"""Programs kept at a time: those of one test. A process can map only so many."""


class Programs:
    """Compiled programs of threads, the latest few.

    Not a `functools.lru_cache`, which lets two threads that start together both compile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple, Any] = {}

    def run(self, jaxpr: Any, consts: Sequence[Any], *args: Any) -> None:
        """What the interpreter calls in every thread, instead of its own `_run_jaxpr`."""
        self._of(jaxpr, consts, args)(consts, *args)

    def _of(self, jaxpr: Any, consts: Sequence[Any], args: tuple) -> Any:
        key = (jaxpr, *((x.shape, x.dtype) for x in (*consts, *args)))
        with self._lock:
            if key not in self._held:
                while len(self._held) >= KEPT:
                    del self._held[next(iter(self._held))]
                self._held[key] = _compiled(jaxpr, consts, args)
            return self._held[key]


def _compiled(jaxpr: Any, consts: Sequence[Any], args: tuple) -> Any:
    def thread(consts: Sequence[Any], *args: Any) -> None:
        jax.core.eval_jaxpr(jaxpr, consts, *args)

    return jax.jit(thread, compiler_options=quick.OPTIONS).trace(consts, *args).lower().compile()


def install(patch: pytest.MonkeyPatch) -> None:
    """Has the interpreter use one `Programs` for as long as the patch lasts."""
    from jax._src.pallas.mosaic.interpret import thread_map

    if hasattr(thread_map, "_run_jaxpr"):
        patch.setattr(thread_map, "_run_jaxpr", Programs().run)
