"""How many programs were compiled since a moment: after warm-up there should be none."""

from __future__ import annotations

import functools

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class _Listener:
    """Counts every program of this process from when it is made. Attributes: `count`."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == _EVENT


_listener = functools.cache(_Listener)
"""One for the process, made when somebody first counts: jax has no way to take a single listener back."""


class CompileCount:
    """Counts from where it is made. Attributes: `since`, programs compiled since then, in this process."""

    def __init__(self) -> None:
        self._before = _listener().count

    @property
    def since(self) -> int:
        """Programs compiled since."""
        return _listener().count - self._before
