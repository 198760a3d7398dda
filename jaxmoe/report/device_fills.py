"""Parts `link` and `fills` of the measurement of expert streaming (`jaxmoe.report.device_bench`): they need no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.report import record
from jaxmoe.report.device_bench import (
    COLUMNS,
    GRAPHS,
    HOST,
    LINK_METHODS,
    MIB,
    Found,
    Part,
    Sizes,
    brief,
    compiled,
    device_to_host,
    host_questions,
    link_ceiling,
    pinned,
    profile,
    random_records,
    seconds_of,
    to_device,
)
from pallas_kernels.dispatch import Kernels
from pallas_kernels.expert_fill import api

# --- Link


def link(part: Part) -> None:
    """Writes the records of part `link`."""
    best = 0.0
    for method in LINK_METHODS:
        found = part.attempt("link", f"link-{method}", {"method": method}, lambda m=method, b=best: link_rates(part.sizes, m, b))  # type: ignore[misc]
        if found is not None:
            best = max(best, found.bound["ceiling"])


def link_rates(sizes: Sizes, method: str, best: float) -> Found:
    """Time and GB/s of one array over the link at each size: one at a time, and eight in a row. `best` is what other methods reached."""
    timings: dict[str, Any] = {}
    counters: dict[str, float] = {}
    compiling = 0.0
    for mib in sizes.link_mib:
        rows = round(mib * MIB / 2 / COLUMNS)
        nbytes = rows * COLUMNS * 2
        call, seconds = _link_call(method, random_records(1, rows, COLUMNS))
        compiling += seconds
        key = f"{mib:g}MiB"
        for name, in_a_row in ((key, 1), (f"{key}_in_a_row", 8)):
            timings[name] = record.timing(seconds_of(call, sizes.repeats, in_a_row))
            counters[f"gbps_{name}"] = nbytes / timings[name]["median"] / 1e9
    fastest = max(counters.values())
    return Found(timings, counters, record.make_bound("link", max(best, fastest), fastest, "GB/s"), compiling)


def _link_call(method: str, records: np.ndarray) -> tuple[Callable[[], Any], float]:
    """A call that brings the record from pinned host memory to the device, and seconds of compiling."""
    store = pinned(records)
    if method == "device_put":
        return lambda: to_device(store), 0.0
    one = jnp.zeros(1, jnp.int32)
    filler = InProgram(method, store, (jnp.zeros(records.shape, records.dtype),), one, one)
    return lambda: filler.run(1), filler.compile_seconds


# --- Fills


class InProgram:
    """A fill as a program. Attributes: `pools` as the last call left them; `compile_seconds`; `program`."""

    def __init__(self, method: str, store: jax.Array, pools: tuple, ids_M: jax.Array, slots_M: jax.Array):
        kernels = Kernels.default()

        def fill(pools, store, ids, slots, n):
            return api.fill(pools, store, ids, slots, 0, n, kernels, _plain(method))

        self.pools, self._rest, self._counts = pools, (store, ids_M, slots_M), counts(ids_M)
        self.program, self.compile_seconds, _ = compiled(jax.jit(fill, donate_argnums=0), pools, *self._rest, self._counts[0])

    def run(self, misses: int) -> Any:
        """Fills the first slots asked for."""
        self.pools, _ = self.program(self.pools, *self._rest, self._counts[misses])
        return self.pools


class FromHost:
    """A fill by the host: each record sent by `device_put`, then written into its slot. Attributes: see `InProgram`."""

    program = None

    def __init__(self, store: np.ndarray, pools: tuple, ids_M: jax.Array, slots_M: jax.Array):
        self.pools, self._slots = pools, [jnp.int32(s) for s in np.asarray(slots_M)]
        self._records = [pinned(store[i]) for i in np.asarray(ids_M)]
        self._land, self.compile_seconds, _ = compiled(jax.jit(api.land, donate_argnums=0), pools, to_device(self._records[0]), self._slots[0])

    def run(self, misses: int) -> Any:
        """See `InProgram.run`; all records are sent before the first is written."""
        sent = [to_device(r) for r in self._records[:misses]]
        for r, slot in zip(sent, self._slots, strict=False):
            self.pools = self._land(self.pools, r, slot)
        return self.pools


class LayersInProgram:
    """`layered_step` as one program. Attributes: see `InProgram`."""

    def __init__(self, method: str, store: jax.Array, pools: tuple, ids_LM: jax.Array, slots_M: jax.Array, w_LDD: jax.Array):
        self.pools, self._x, self._counts = pools, jnp.ones((1, w_LDD.shape[1]), jnp.bfloat16), counts(slots_M)
        self._rest = (w_LDD, ids_LM, slots_M, store)
        step = jax.jit(layered_step(method, Kernels.default()), donate_argnums=0)
        self.program, self.compile_seconds, _ = compiled(step, pools, self._x, self._counts[0], *self._rest)

    def run(self, misses: int) -> Any:
        """One step of so many misses a layer."""
        self.pools, x = self.program(self.pools, self._x, self._counts[misses], *self._rest)
        return self.pools, x


class LayersFromHost:
    """The same step by the host, which reads every layer's number of misses before it sends anything. Attributes: see `InProgram`."""

    program = None

    def __init__(self, filler: FromHost, w_LDD: jax.Array):
        self._filler, self._weights, self._x = filler, list(w_LDD), jnp.ones((1, w_LDD.shape[1]), jnp.bfloat16)
        self._counts = counts(filler.pools[0])
        self._front, self.compile_seconds, _ = compiled(jax.jit(front), self._x, self._weights[0], self._counts[0])

    def run(self, misses: int) -> Any:
        """See `LayersInProgram.run`."""
        x, n = self._x, self._counts[misses]
        for w in self._weights:
            x, count = self._front(x, w, n)
            self._filler.run(int(count))
        return self._filler.pools, x


def layered_step(method: str, kernels: Kernels) -> Callable:
    """`(pools, x, n, w [L, D, D], ids [L, M], slots [M], store) -> (pools, x)`: a matmul a layer, and a fill of n records, which depends on it."""

    def step(pools, x, n, w_LDD, ids_LM, slots_M, store):
        def layer(carry, own):
            x, pools = carry
            x, misses = front(x, own[0], n)
            return (x, api.fill(pools, store, own[1], slots_M, 0, misses, kernels, _plain(method))[0]), None

        (x, pools), _ = jax.lax.scan(layer, (x, pools), (w_LDD, ids_LM))
        return pools, x

    return step


def counts(like_M: jax.Array) -> list[jax.Array]:
    """0 to M on the device, so that no number has to be sent there while time is taken."""
    return [jnp.int32(n) for n in range(len(like_M) + 1)]


def _plain(method: str) -> str:
    """The fill's own name; XLA's flags make the difference between these two."""
    return "while" if method == GRAPHS else method


def front(x: jax.Array, w: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A layer's dense work, and how many records it misses: n, but only the data says so, as with a router."""
    x = jnp.tanh(x @ w)
    return x, n + (x[0, 0] > 1e9).astype(jnp.int32)


def fills(part: Part) -> None:
    """Writes the record of part `fills` for one method."""
    assert part.method is not None
    part.attempt("fill", f"fill-{part.method}", {"method": part.method}, lambda: measure_fill(part, part.method or ""))


def measure_fill(part: Part, method: str) -> Found:
    """One method: no miss, one and all, at every size; then in a step of layers, with the copies to the host that its profile shows.

    Counters: `us_per_miss_*` and `gbps_*` see `seconds_per_miss`; `right` 1 where every slot's bits were the record's;
    `device_to_host_copies` of one step with misses.
    """
    sizes, timings, counters, compiling = part.sizes, {}, {"right": 1.0}, 0.0
    for name, shape in sizes.fills.items():
        store, pools, ids, slots = fill_arrays(*shape)
        filler = FromHost(store, pools, ids, slots) if method == HOST else InProgram(method, pinned(store), pools, ids, slots)
        compiling += filler.compile_seconds
        counters["right"] = min(counters["right"], float(is_right(filler.run(len(ids)), store, ids, slots)))
        for label, n in (("none", 0), ("one", 1), ("all", len(ids))):
            timings[f"{name}_{label}"] = record.timing(seconds_of(lambda n=n, f=filler: f.run(n), sizes.repeats))  # type: ignore[misc]
        per_miss = seconds_per_miss(method, timings[f"{name}_one"]["median"], timings[f"{name}_all"]["median"], len(ids))
        counters[f"us_per_miss_{name}"] = per_miss * 1e6
        counters[f"gbps_{name}"] = store[0].nbytes / per_miss / 1e9
        del filler
    layered = _layers(sizes, method)
    for label, n in (("none", 0), ("one", 1), ("four", 4)):
        timings[f"layers_{label}"] = record.timing(seconds_of(lambda n=n: layered.run(n), sizes.repeats))  # type: ignore[misc]
    settings = {"layers": sizes.layers, "shapes": {n: list(s) for n, s in sizes.fills.items()}}
    if layered.program is not None:
        counters |= host_questions(layered.program)
    try:
        counters["device_to_host_copies"] = float(len(device_to_host(profile(lambda: layered.run(4)))))
    except RuntimeError as error:
        settings["profile_failed"] = brief(str(error))
    bound = record.make_bound("link", link_ceiling(part), counters[f"gbps_{sizes.layered}"], "GB/s")
    return Found(timings, counters, bound, compiling + layered.compile_seconds, settings=settings, seeds={"records": 0})


def seconds_per_miss(method: str, one: float, every: float, asked: int) -> float:
    """By the slope between one miss and all of them; by all where a method always moves all, and where the noise is larger than the slope."""
    return every / asked if method == "fixed" or every <= one else (every - one) / (asked - 1)


def fill_arrays(width: int, hidden: int, asked: int) -> tuple[np.ndarray, tuple, jax.Array, jax.Array]:
    """Records of twice as many experts as are asked for, empty pools of [D, 2, F] and [F, D], and which record goes to which slot."""
    store = random_records(2 * asked, 3 * width * hidden // COLUMNS, COLUMNS)
    pools = tuple(jnp.zeros((asked, *entry), store.dtype) for entry in ((width, 2, hidden), (hidden, width)))
    rng = np.random.default_rng(1)
    return store, pools, jnp.asarray(rng.permutation(2 * asked)[:asked], jnp.int32), jnp.asarray(rng.permutation(asked), jnp.int32)


def is_right(pools: tuple, store: np.ndarray, ids: jax.Array, slots: jax.Array) -> bool:
    """Whether every slot holds its record, bit for bit."""
    held = [np.asarray(pool).reshape(len(pool), -1) for pool in pools]
    pairs = zip(np.asarray(ids), np.asarray(slots), strict=True)
    return all(np.array_equal(np.concatenate([pool[s] for pool in held]), store[i].reshape(-1)) for i, s in pairs)


def _layers(sizes: Sizes, method: str) -> LayersInProgram | LayersFromHost:
    width, hidden, asked = sizes.fills[sizes.layered]
    store, pools, ids, slots = fill_arrays(width, hidden, asked)
    w_LDD = jnp.ones((sizes.layers, width, width), jnp.bfloat16) / width
    if method == HOST:
        return LayersFromHost(FromHost(store, pools, ids, slots), w_LDD)
    ids_LM = (ids[None] + jnp.arange(sizes.layers, dtype=jnp.int32)[:, None]) % len(store)
    return LayersInProgram(method, pinned(store), pools, ids_LM, slots, w_LDD)
