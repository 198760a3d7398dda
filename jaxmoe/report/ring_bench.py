"""What attention round a ring of devices sends, as compiled, beside the formulas; how evenly work is dealt; and how far results are off.

On virtual devices of one CPU, times across devices mean nothing, so none are taken. XLA's own estimate for TPUs (`optimal_seconds`) is none either:
for these programs it is negative.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxmoe import formats
from jaxmoe.cache import ring
from jaxmoe.cache.deal import balance, pairs, zigzag
from jaxmoe.cache.masks import seen
from jaxmoe.report import record
from jaxmoe.spec import AttentionSpec
from jaxmoe.spec.published import published
from sharding.hlo import collectives

AXIS = "sequence"
_UNTIMED: dict[str, bool | int] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Nothing here is timed, and compiling takes longer than running."""
WAYS: tuple[ring.Way, ...] = ("ring", "token", "direct")


def by_shift(hlo_text: str, n: int) -> dict[int, float]:
    """Bytes that a device sends in a program's permutes over a mesh of one axis of n devices, by how many places on they go.

    Raises:
        ValueError: there is another collective, or one that runs an unknown number of times.
    """
    out: dict[int, float] = {}
    for found in collectives(hlo_text):
        if found.kind != "collective-permute" or found.times is None:
            raise ValueError(f"{found.name} in {found.computation}: a {found.kind} that runs {found.times} times is none of the ring's")
        (shift,) = {(target - source) % n for source, target in found.groups}
        out[shift] = out.get(shift, 0.0) + found.bytes * found.times
    return out


def attention_of(model: str) -> AttentionSpec:
    """A released model's attention in its widest-seeing layer.

    Raises:
        SpecError: no such model.
        ValueError: it has no attention.
    """
    found = [layer.attention for layer in published(model).layers if layer.attention is not None]
    if not found:
        raise ValueError(f"{model} has no attention layer")
    return next((a for a in found if a.window is None and a.chunk is None), found[0])


def program(spec: AttentionSpec, n: int, way: ring.Way) -> Any:
    """The jitted `(q, k, v, q_positions, k_positions) -> o` of whole arrays, divided over n devices along their first axes."""
    mesh, part = Mesh(np.array(jax.devices()[:n]), (AXIS,)), PartitionSpec(AXIS)

    def attend(q, k, v, at_query, at_key):
        return ring.ring_attention(q, k, v, at_query, at_key, spec, AXIS, way=way)

    return jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=part, out_specs=part, check_vma=False), compiler_options=_UNTIMED)


def counted(spec: AttentionSpec, n: int, way: ring.Way, tokens: int, keys: int) -> dict[str, Any]:
    """Bytes of one attention in bfloat16, with so many queries and keys on a device: `sent` by shift, `forward` and `backward` by the formula."""
    kv_heads, c, value = spec.cached
    one = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    k, v = (None if w is None else jax.ShapeDtypeStruct((n * keys, kv_heads, w), formats.leaf_dtype("bfloat16")) for w in (c, value))
    q = jax.ShapeDtypeStruct((n * tokens, spec.heads, c), jnp.bfloat16)
    started = time.perf_counter()
    text = program(spec, n, way).lower(q, k, v, one((n * tokens,)), one((n * keys,))).compile().as_text()
    seconds = time.perf_counter() - started
    forward, backward = ring.traffic(way, n, *sizes(spec, tokens, keys))
    return {"sent": by_shift(text, n), "forward": forward, "backward": backward, "compile_seconds": seconds}


def sizes(spec: AttentionSpec, tokens: int, keys: int, held: int = 2) -> tuple[int, int, int]:
    """`ring.traffic`'s three sizes, of a device."""
    return ring.key_bytes(spec, keys, held), ring.query_bytes(spec, tokens, held, tokens), ring.result_bytes(spec, tokens)


def keys_a_query(spec: AttentionSpec, n: int) -> float:
    """How many keys a device holds for each query of a step where keys and queries send as much."""
    key, query, result = sizes(spec, 1, 1)
    return ((n - 1) * query + n * result) / ((n - 1) * key)


def error(spec: AttentionSpec, n: int, way: ring.Way, tokens: int, seed: int = 0) -> float:
    """The largest difference from attention on one device, of a prompt of n * tokens standard normal values in float32, in zig-zag order."""
    kv_heads, c, value = spec.cached
    rng, total = np.random.default_rng(seed), n * tokens
    q, k = (rng.normal(size=(total, heads, c)).astype(np.float32) for heads in (spec.heads, kv_heads))
    v = None if value is None else rng.normal(size=(total, kv_heads, value)).astype(np.float32)
    order = np.argsort(zigzag(np.arange(total) // max(1, tokens // 2), n), kind="stable").astype(np.int32)
    found = program(spec, n, way)(q[order], k[order], None if v is None else v[order], order, order)
    return float(np.abs(np.asarray(found) - _alone(spec, q, k, v)[order]).max())


def _alone(spec: AttentionSpec, q: np.ndarray, k: np.ndarray, v: np.ndarray | None) -> np.ndarray:
    """Causal attention in float64, head after head."""
    at, out = np.arange(len(q)), []
    visible = np.asarray(seen(spec, jnp.asarray(at)[:, None], jnp.asarray(at)))
    for h in range(spec.heads):
        own = h * k.shape[1] // spec.heads
        keys, values = k[:, own].astype(np.float64), (k[..., : ring.value_width(spec)] if v is None else v)[:, own].astype(np.float64)
        s = np.where(visible, q[:, h].astype(np.float64) @ keys.T * spec.softmax_scale, -np.inf)
        p = np.exp(s - s.max(1, keepdims=True))
        out.append(p @ values / p.sum(1, keepdims=True))
    return np.stack(out, 1)


def balances(spec: AttentionSpec, n: int, positions: int, run: int) -> dict[str, tuple[float, float]]:
    """`deal.balance` of a prompt: in n contiguous parts, one position a device in turn, in 2n zig-zag parts, and in zig-zag runs."""
    at = np.arange(positions)
    dealt = {
        "contiguous": at * n // positions, "striped": at % n, "zigzag_halves": zigzag(at * 2 * n // positions, n),
        "zigzag_runs": zigzag(at // run, n),
    }  # fmt: skip
    return {name: balance(pairs(spec, owner, n)) for name, owner in dealt.items()}


def measure(model: str, n: int, tokens: int = 16, positions: int = 4096, run: int = 32, ways: Sequence[ring.Way] = WAYS) -> dict[str, Any]:
    """One model's record.

    Args:
        model: of `jaxmoe.spec.published`.
        n: devices.
        tokens: keys, and queries, on each device where bytes are counted and errors measured.
        positions, run: the prompt, and the runs, whose balance is given.
        ways: what is compared.

    Returns:
        A record. In `bytes`, `WAY_sent_back` leaves out what goes one place on; 'direct' has a result from n - 1 hops away go home so.
    """
    spec = attention_of(model)
    sent = {way: counted(spec, n, way, tokens, tokens) for way in ways}
    nbytes = {}
    for way, found in sent.items():
        back = {shift: b for shift, b in found["sent"].items() if shift != 1 or n == 2}
        nbytes[f"{way}_sent"] = int(sum(found["sent"].values()))
        nbytes[f"{way}_sent_back"] = int(sum(back.values()))
        nbytes |= {f"{way}_forward_formula": int(found["forward"]), f"{way}_backward_formula": int(found["backward"])}
    counters: dict[str, float] = {f"{way}_error": error(spec, n, way, tokens) for way in ways}
    for name, (whole, hops) in balances(spec, n, positions, run).items():
        counters |= {f"{name}_work": whole, f"{name}_work_by_hop": hops}
    counters |= {"hops": n - 1, "keys_a_query_even": keys_a_query(spec, n), "group": spec.heads / spec.cached[0]}
    chosen = {f"{keys}": ring.choose(n, *sizes(spec, 1, keys)) for keys in (1, 4, 16, 64, 256, 1024)}
    total, formula = (sum(f(found) for found in sent.values()) for f in (lambda s: sum(s["sent"].values()), lambda s: s["forward"] + s["backward"]))
    return record.make_record(
        name="ring_attention", spec_hash="",
        settings={
            "model": model, "attention": {"heads": spec.heads, "kv_heads": spec.cached[0], "key": spec.cached[1], "value": ring.value_width(spec)},
            "devices": n, "tokens": tokens, "dtype": "bfloat16", "positions": positions, "run": run, "way_by_keys_a_query": chosen,
        },
        seeds={"values": 0}, timings={}, compile_seconds=sum(s["compile_seconds"] for s in sent.values()), bytes=nbytes, counters=counters,
        bound=record.make_bound("link", formula, total, "bytes"),
    )  # fmt: skip
