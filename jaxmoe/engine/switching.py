"""Steps by several exchanges over the same arrays, each step by the one that suits its number of tokens.

Parameters, experts and states lie alike whichever exchange a step goes by, so that another one costs nothing but its program: Tutel's adaptive
parallelism (arXiv:2206.03382, section 3.1), with a dictionary from sizes of steps to exchanges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from jaxmoe.cache.batch import Batch
from jaxmoe.decode.sampling import SamplingParams
from jaxmoe.engine.mesh import Devices
from jaxmoe.engine.steps import EngineState, Fused
from jaxmoe.formats import compute_dtype
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels
from sharding.exchange_cost import Shape, best_exchange
from sharding.split import Exchange, SplitError

Pick = Callable[[int], Exchange]
"""The exchange for a step of so many tokens on each device."""


def with_exchange(on: Devices, exchange: Exchange) -> Devices:
    """The same devices, with the same layout of every array, and another exchange.

    Raises:
        SplitError: an exchange that needs its own layout, or a split without one.
    """
    split = on.layout.split
    if exchange not in get_args(Exchange) or "coherent" in (exchange, split.exchange):
        raise SplitError(f"exchange = {exchange!r} over the arrays of {split.exchange!r}: choose among tokens, gather, weights")
    if split.attention != "data" or not on.layout.experts:
        raise SplitError(f"exchange = {exchange!r}: the split {split} has no exchange, it needs expert > 1 and attention = data")
    return dataclasses.replace(on, layout=dataclasses.replace(on.layout, split=dataclasses.replace(split, exchange=exchange)))


def by_traffic(spec: ModelSpec, on: Devices, kernels: Kernels, choices: tuple[Exchange, ...] = ("tokens", "gather", "weights")) -> Pick:
    """Picks what sends the fewest bytes for evenly spread routing (`sharding.exchange_cost`); experts that are streamed can't be sent: leave out
    'weights' then."""
    router, experts = spec.moe
    n, hidden = on.layout.size(on.layout.experts), experts.width // on.layout.size(on.layout.expert_hidden)
    nbytes = compute_dtype(spec.precision.compute).itemsize

    def pick(tokens: int) -> Exchange:
        return best_exchange(Shape(tokens, router.active, router.experts, n, spec.width, hidden, nbytes, kernels.backend), choices)

    return pick


def by_table(table: Mapping[int, Exchange]) -> Pick:
    """Picks from a table as measurements give one: by the smallest number of tokens that is not below a step's, or else the largest.

    Raises:
        ValueError: the table is empty.
    """
    if not table:
        raise ValueError("a table of exchanges is empty: give at least one number of tokens")
    sizes = sorted(table)

    def pick(tokens: int) -> Exchange:
        return table[next((size for size in sizes if size >= tokens), sizes[-1])]

    return pick


class Switching:
    """Runs prefill and decode by the exchange that `pick` says, as `steps.Fused` runs them by one. Give it to an `Engine` as its `programs`.

    Attributes: `stalled`, seconds that the host waited for experts: none; `used`, how many steps went by each exchange.
    """

    stalled = 0.0

    def __init__(self, spec: ModelSpec, kernels: Kernels, greedy: bool, on: Devices, pick: Pick | None = None, record: bool = False):
        self._how = (spec, kernels, greedy, record, False)
        self._on, self._pick = on, pick or by_traffic(spec, on, kernels)
        self._groups = on.layout.shards
        self._token_groups = self._groups * on.layout.size(on.layout.sequence)
        self._programs: dict[Exchange, Fused] = {}
        self.used: dict[Exchange, int] = {}

    def ways(self) -> Iterator[None]:
        """One way of stepping for each number of rows."""
        yield

    def restart(self) -> None:
        """Nothing is kept from step to step but how many there were."""
        self.used = {}

    def prefill(self, params, bank, state: EngineState, batch: Batch, sampling: SamplingParams, positions) -> Any:
        """See `steps.prefill_step`."""
        return self._by(len(batch.tokens) // self._token_groups).prefill(params, bank, state, batch, sampling, positions)

    def decode(self, params, bank, state: EngineState, rows, tokens, positions, budget, eos, sampling: SamplingParams) -> Any:
        """See `steps.decode_step`."""
        return self._by(len(rows) // self._groups).decode(params, bank, state, rows, tokens, positions, budget, eos, sampling)

    def _by(self, tokens: int) -> Fused:
        exchange = self._pick(tokens)
        if exchange not in self._programs:
            self._programs[exchange] = Fused(*self._how, with_exchange(self._on, exchange))
        self.used[exchange] = self.used.get(exchange, 0) + 1
        return self._programs[exchange]
