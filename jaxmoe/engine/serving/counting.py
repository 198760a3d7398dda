"""What an engine counts as it goes, by the names that `jaxmoe.server.metrics` shows."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

from jaxmoe.engine.serving.runner import Runner
from jaxmoe.engine.serving.state import SchedulerState
from jaxmoe.engine.serving.types import StepPlan


class Tally:
    """A histogram in the making: how many values are at most each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds, self._counts, self._sum = list(bounds), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def shown(self) -> dict[str, Any]:
        """As `jaxmoe.server.metrics` takes it."""
        return {"bounds": list(self._bounds), "counts": list(self._counts), "sum": self._sum}


class Watch:
    """Sees every step. `see` asks the device for nothing, which would wait for what is still being computed; `shown` reads the bank's counters."""

    def __init__(self) -> None:
        self._queued = Tally((0.001, 0.01, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0))
        self._tokens = Tally((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096))
        self._distinct = Tally((1, 2, 4, 8, 16, 32, 64, 128, 256))
        self._groups = 0

    def see(self, plan: StepPlan, tokens: int, waits: Iterable[float]) -> None:
        """A step that was done: its plan, the tokens that it gave, and seconds that sequences had waited which it was the first for."""
        self._groups += plan.group is not None
        done = plan.group.pieces if plan.group is not None and plan.group.last else ()
        self._tokens.add(tokens + sum(piece.count for piece in (*plan.chunk, *done)))
        for seconds in waits:
            self._queued.add(seconds)

    def shown(self, state: SchedulerState, runner: Runner) -> dict[str, Any]:
        """Everything so far, and how things stand."""
        counts = state.counters
        out: dict[str, Any] = {
            "running": len(state.running), "waiting": state.waiting, "swapped": len(state.swapped), "steps": counts.steps,
            "pages": {name: getattr(state.pool, name) for name in ("free", "cached", "held")},
            "host_pages": {name: getattr(state.host, name) for name in ("free", "cached", "held")},
            "preemptions": {"swap": counts.swaps, "recompute": counts.preemptions - counts.swaps},
            "prefix_queries": counts.prompt + counts.cached, "prefix_hits": counts.cached,
            "computed_tokens": {"prompt": counts.prompt, "decode": counts.decode}, "padded_tokens": runner.padded,
            "swap_bytes": {"out": runner.host.bytes_out, "in": runner.host.bytes_in}, "layer_group_iterations": self._groups,
            "queue_seconds": self._queued.shown(), "step_tokens": self._tokens.shown(),
        }  # fmt: skip
        found = runner.counters()
        if found:
            asked, hits, loads = (int(found[name].sum()) for name in ("requests", "hits", "loads"))
            bank = runner.model.bank
            out |= {"expert_hits": hits, "expert_misses": asked - hits, "expert_loads": loads, "expert_bytes_h2d": loads * bank.record_bytes}
            runner.decoded.read()
            for n in runner.decoded.each:
                self._distinct.add(n)
            runner.decoded.each.clear()
            if runner.regret is not None:
                out |= {"expert_regret": runner.regret.loads - runner.regret.best_loads, "expert_best_loads": runner.regret.best_loads}
            out |= {"expert_stall_seconds": runner.stalled, "expert_slots": sum(bank.slots), "distinct_experts": self._distinct.shown()}
        return out


def computed(plan: StepPlan) -> set[int]:
    """Sequences that a plan computes tokens of."""
    pieces = (*plan.chunk, *(plan.group.pieces if plan.group is not None else ()))
    return {row.id for row in plan.decode} | {piece.id for piece in pieces}
