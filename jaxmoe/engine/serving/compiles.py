"""How many programs were compiled since a moment: after warm-up there should be none."""

from __future__ import annotations

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _count
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


class CompileCount:
    """Counts from where it is made. Attributes: `since`, programs compiled since then, in this process."""

    def __init__(self) -> None:
        self._before = _count

    @property
    def since(self) -> int:
        """Programs compiled since."""
        return _count - self._before
