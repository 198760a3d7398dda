"""What each device has to do in a step: arithmetic, bytes of memory, bytes over links and from the host, operation by operation.

Counts are of what has to be done, from shapes alone; rates, and so seconds, are `sharding.time_model`'s.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

from jaxmoe.spec import ModelSpec
from jaxmoe.spec.types import AttentionSpec, DeltaSpec, LayerSpec, RouterSpec
from sharding.exchange_cost import Shape, even_rooms, traffic, transport, waves, worst_rooms
from sharding.hardware import Backend
from sharding.link_time import Kind
from sharding.phases import Count, Phase, run_length
from sharding.routing_load import Routing, load, missed
from sharding.split import Layout
from sharding.temporaries import ROW_BUCKETS
from sharding.workload import WIDTH, Workload


class Op(NamedTuple):
    """An operation of one device: `times` in a step; each so many multiply-adds (counted twice), bytes of its memory, and bytes from its host."""

    name: str
    times: int
    flops: float
    nbytes: float
    host_bytes: float = 0.0


class Collective(NamedTuple):
    """A collective: `times` in a step, over these axes of the mesh; `nbytes` as `collective_seconds` takes them."""

    name: str
    times: int
    kind: Kind
    axes: tuple[str, ...]
    nbytes: float


class Work(NamedTuple):
    """All of a step."""

    ops: tuple[Op, ...]
    collectives: tuple[Collective, ...]


@functools.lru_cache(maxsize=64)
def kinds(spec: ModelSpec, repeated: bool = True) -> tuple[tuple[LayerSpec, int], ...]:
    """The model's different layers, and how many it has of each; without `repeated`, how many there are in the segments' patterns."""
    found: dict[LayerSpec, int] = {}
    for segment in spec.segments:
        for layer in segment.pattern:
            found[layer] = found.get(layer, 0) + (segment.repeats if repeated else 1)
    return tuple(found.items())


@dataclasses.dataclass(frozen=True)
class _Step:
    """What the operations of a step have in common."""

    spec: ModelSpec
    layout: Layout
    workload: Workload
    phase: Phase
    count: Count
    routing: Routing | None
    backend: Backend

    @property
    def width(self) -> int:
        return WIDTH[self.workload.dtype]

    @property
    def tokens(self) -> float:
        """Of one device, outside of experts: prompts are divided among those of the sequence axis."""
        return self.phase.computed / self._parts

    @property
    def routed(self) -> float:
        """Those of them that aren't padding, which has no experts."""
        return self.phase.tokens / self._parts

    @property
    def _parts(self) -> int:
        return self.layout.size(self.layout.sequence) if self.phase.kind == "prefill" else 1

    def matmul(self, name: str, times: int, rows: float, inputs: float, outputs: float, weight_bytes: int | None = None) -> Op:
        """Rows times a matrix of weights that is read once."""
        w = self.width
        return Op(name, times, 2 * rows * inputs * outputs, inputs * outputs * (weight_bytes or w) + rows * (inputs + outputs) * w)


def step_work(
    spec: ModelSpec, layout: Layout, workload: Workload, phase: Phase, count: Count = "needed", routing: Routing | None = None,
    backend: Backend = "tpu", temporaries: float = 0.0,
) -> Work:  # fmt: skip
    """What one device does in a step of `phase`.

    Stages work at once, on different parts of the tokens (`jaxmoe.nn.pipeline`): each goes through its layers once a tick, and reads their weights as
    often.

    Args:
        spec: the whole model.
        layout: how it is divided.
        workload: dtypes and slots.
        phase: of `sharding.phases`.
        count: see `Count`.
        routing: which experts are asked for; evenly many if not given.
        backend: of the devices, which exchanges differ by.
        temporaries: bytes that a compiler adds for copies, which are written and read once.
    """
    at = _Step(spec, layout, workload, phase, count, routing, backend)
    ops: list[Op] = []
    collectives: list[Collective] = []
    staged, ticks = _part(at)
    for layer, times in kinds(spec, count != "compiled"):
        times = times if count == "compiled" else times // layout.size(layout.stage) * ticks
        for part in (_mixer(staged, layer, times), _feed_forward(staged, layer, times)):
            ops += part.ops
            collectives += part.collectives
    ends = _ends(at, staged.tokens, ticks)
    collectives = [c for c in (*collectives, *ends.collectives) if layout.size(c.axes) > 1]
    copies = (Op("temporaries", 1, 0.0, 2 * temporaries),) if temporaries else ()
    return Work((*ops, *ends.ops, *copies), tuple(collectives))


def _part(at: _Step) -> tuple[_Step, int]:
    """What a device's layers see at a time, and how many times.

    n parts take n + s - 1 ticks to pass s stages (arXiv:1811.06965, section 2.3): one a stage, or as many of them as the step's runs divide into.
    """
    stages, phase = at.layout.size(at.layout.stage), at.phase
    if stages == 1:
        return at, 1
    n = _parts(at, stages)
    chunk = min(phase.chunk, math.ceil(phase.computed / n))  # a part of a prompt reads the keys of the parts before it
    cut = dataclasses.replace(phase, tokens=phase.tokens / n, rows=phase.rows / n, chunk=chunk, room=phase.room / n)
    return dataclasses.replace(at, phase=cut), n + stages - 1


def _parts(at: _Step, stages: int) -> int:
    tokens = math.ceil(at.phase.computed)
    if at.phase.kind == "decode":
        runs = next((rows for rows in ROW_BUCKETS if tokens <= rows), tokens)
    elif at.layout.size(at.layout.sequence) > 1:
        return 1
    else:
        runs = tokens // run_length(tokens)
    return max(n for n in range(1, stages + 1) if runs % n == 0)


def _ends(at: _Step, part: float, ticks: int) -> Work:
    """Embedding and logits, and what goes from stage to stage: `part` tokens in each tick of each segment, and what comes out to all."""
    spec, layout, w, d = at.spec, at.layout, at.width, at.spec.width
    rows, own = at.phase.logits, spec.vocab / layout.size(layout.vocab)
    head = Op("logits", 1, 2 * rows * d * own, d * own * w + rows * (d * w + own * 4))
    embed = Op("embed", 1, 0.0, 2 * at.tokens * d * w)
    segments = len(spec.segments)
    return Work((embed, head), (
        Collective("embed", 1, "psum", layout.vocab, at.tokens * d * w),
        Collective("tokens", 1, "all_gather", layout.vocab, rows * layout.size(layout.vocab) * 8),  # each device's likeliest and its logit
        Collective("stage", segments * (1 if at.count == "compiled" else ticks), "ppermute", layout.stage, part * d * w),
        Collective("stages", segments, "psum", layout.stage, at.tokens * d * w),
    ))  # fmt: skip


def _mixer(at: _Step, layer: LayerSpec, times: int) -> Work:
    """Attention or a delta rule, with its norms and the sum over heads."""
    d, w, t, layout = at.spec.width, at.width, at.tokens, at.layout
    if layer.attention is not None:
        parts = (_latent if layer.attention.latent is not None else _grouped)(at, layer.attention, times)
        ring = list(_sequence(at, layer.attention, times))
    else:
        assert layer.delta is not None, "a layer has attention or a delta rule"
        parts, ring = _delta(at, layer.delta, times), []
    # A norm reads and writes the residual stream, an addition reads two of its kind and writes one.
    around = Op("norms", times, 0.0, 5 * t * d * w)
    return Work((*parts, around), (*ring, Collective("attention", times, "psum", layout.heads, t * d * w)))


def _heads(at: _Step, a: AttentionSpec) -> tuple[float, int]:
    """Heads, and key-value heads, of one device."""
    n = at.layout.size(at.layout.heads)
    return a.heads / n, max(1, a.kv_heads // n)


def _attend(at: _Step, a: AttentionSpec, times: int, heads: float) -> Op:
    """Scores and weighted sums over what is cached, and writing what is new."""
    kv_heads, key, value = a.cached
    if a.latent is None:
        kv_heads = _heads(at, a)[1]
    kept = kv_heads * (key + (value or 0)) * WIDTH[at.workload.kv_dtype]
    pairs, reads = at.phase.attended(a, at.count)
    n = at.layout.size(at.layout.sequence)
    out = value if value is not None else a.latent.kv_rank if a.latent else key
    # In a prompt that is divided, every part of the keys comes by every device; in a decode step each reads its own part.
    here = reads if at.phase.kind == "prefill" else reads / n
    moved = (here + at.phase.computed / n) * kept + at.tokens * heads * (key + out) * at.width
    return Op("attend", times, 2 * (pairs / n) * heads * (key + out), moved)


def _grouped(at: _Step, a: AttentionSpec, times: int) -> list[Op]:
    heads, kv = _heads(at, a)
    d, c, t = at.spec.width, a.head_dim, at.tokens
    outputs = (heads * (2 if a.gate else 1) + kv * (2 if a.values == "own" else 1)) * c
    return [at.matmul("qkv", times, t, d, outputs), _attend(at, a, times, heads), at.matmul("attention out", times, t, heads * c, d)]


def _latent(at: _Step, a: AttentionSpec, times: int) -> list[Op]:
    """The absorbed form: queries go into the latent's space and outputs out of it (arXiv:2405.04434, section 2.1)."""
    m = a.latent
    assert m is not None, "latent attention needs its ranks"
    heads, d, t = _heads(at, a)[0], at.spec.width, at.tokens
    queries = [at.matmul("q down", times, t, d, m.q_rank), at.matmul("q up", times, t, m.q_rank, heads * a.head_dim)] if m.q_rank else []
    queries = queries or [at.matmul("q", times, t, d, heads * a.head_dim)]
    absorb = Op("absorb", times, 2 * t * heads * m.kv_rank * (m.plain + m.value), heads * m.kv_rank * (m.plain + m.value) * at.width)
    down = at.matmul("kv down", times, t, d, a.cached[1])
    return [*queries, down, absorb, _attend(at, a, times, heads), at.matmul("attention out", times, t, heads * m.value, d)]


def _delta(at: _Step, s: DeltaSpec, times: int) -> list[Op]:
    """A gated delta rule: its projections, and one pass over the state a token (arXiv:2412.06464: decay, correct, read: three products)."""
    n = at.layout.size(at.layout.heads)
    k, v, d, t = s.k_heads * s.k_dim / n, s.v_heads * s.v_dim / n, at.spec.width, at.tokens
    state = s.v_heads / n * s.k_dim * s.v_dim
    sequences = at.phase.rows if at.phase.kind == "decode" else max(1.0, at.phase.tokens / at.phase.length)
    rule = Op("delta rule", times, 6 * t * state, 2 * sequences * state * 4 + t * (2 * k + 2 * v) * at.width)
    return [at.matmul("delta in", times, t, d, 2 * k + 2 * v + 2 * s.v_heads / n), rule, at.matmul("delta out", times, t, v, d)]


def _sequence(at: _Step, a: AttentionSpec, times: int) -> Iterable[Collective]:
    """Where positions are divided: partial results are joined in a decode step, keys and values go round in a prompt."""
    axes, n = at.layout.sequence, at.layout.size(at.layout.sequence)
    kv_heads, key, value = a.cached
    heads, own = _heads(at, a)
    out = value if value is not None else a.latent.kv_rank if a.latent else key
    if at.phase.kind == "decode":
        return [Collective("attention parts", times, "psum", axes, at.tokens * heads * (out + 2) * 4)]
    kept = (own if a.latent is None else kv_heads) * (key + (value or 0)) * WIDTH[at.workload.kv_dtype]
    return [Collective("attention ring", times * (n - 1), "ppermute", axes, at.phase.attended(a, "needed")[1] / n * kept)]


def _feed_forward(at: _Step, layer: LayerSpec, times: int) -> Work:
    """Experts, shared expert and dense network, with one sum over the axes that any of them is divided by."""
    d, w, t, layout = at.spec.width, at.width, at.tokens, at.layout
    ops: list[Op] = []
    collectives: list[Collective] = []
    summed: tuple[str, ...] = ()
    for name, part, axes in (("dense", layer.dense, layout.mlp), ("shared", layer.shared, layout.shared)):
        if part is not None:
            hidden, summed = part.width / layout.size(axes), axes
            ops += [at.matmul(f"{name} in", times, t, d, 2 * hidden), at.matmul(f"{name} out", times, t, hidden, d)]
    if layer.router is not None and layer.experts is not None:
        router = at.matmul("router", times, t, d, layer.router.experts, 4 if layer.router.matmul_dtype == "float32" else None)
        experts = _experts(at, layer, times)
        ops += [router, *experts.ops]
        collectives += experts.collectives
        summed = summed if len(summed) > len(layout.summed) else layout.summed
    collectives.append(Collective("feed forward", times, "psum", summed, t * d * w))
    return Work((*ops, Op("norms", times, 0.0, 5 * t * d * w)), tuple(collectives))


def _experts(at: _Step, layer: LayerSpec, times: int) -> Work:
    """The routed experts of a device, and how tokens and experts meet."""
    router, expert = layer.router, layer.experts
    assert router is not None and expert is not None, "a sparse layer has experts"
    layout, d, w, t = at.layout, at.spec.width, at.width, at.tokens
    n = layout.size(layout.experts)
    meet = n > 1 and layout.split.attention == "data"
    hidden = expert.width / layout.size(layout.expert_hidden)
    record = 3 * d * hidden * w
    given = (router.experts, router.active)
    real = at.routed
    seen = real * n if meet else real  # tokens that any of the group's experts is asked for by
    asked = load(*given, n, seen, at.routing)
    read = asked.distinct
    if meet and layout.split.exchange == "weights":  # each device computes with all that its own tokens ask for
        asked = load(*given, 1, real, at.routing)
        read = asked.distinct
    fills = missed(*given, n, seen, at.workload.slots, at.routing) * record
    pairs = asked.pairs
    if at.count == "compiled":
        pairs = _rows(layout, router, math.ceil(t), d * w, at.backend)
        read = min(router.experts // n, pairs)
    # A row is gathered and read, its hidden row written and read, its result written in float32, put in the tokens' order, and read for their sum.
    moved = read * record + fills + pairs * ((3 * d + 2 * hidden) * w + 4 * d * 4)
    op = Op("experts", times, 6 * pairs * d * hidden, moved, fills)
    if not meet:
        return Work((op,), ())
    kept = 0 if layer.attention is None else _heads(at, layer.attention)[1] * (layer.attention.head_dim * 2)
    shape = Shape(math.ceil(t), router.active, router.experts, n, d, math.ceil(hidden), w, at.backend, kept)
    sent = _meeting(layout, times, shape, once=at.count == "compiled")
    # Buffers are written where rows are put in and read where they come out.
    return Work((op, Op("exchange", times, 0.0, 2 * sum(c.nbytes * c.times for c in sent) / times)), sent)


def _rows(layout: Layout, router: RouterSpec, tokens: int, row_bytes: int, backend: Backend) -> int:
    """Rows that a device's experts compute where those that stay empty count too, as in the kernels' own estimate for the compiler."""
    n, active = layout.size(layout.experts), router.active
    if n == 1 or layout.split.attention == "tensor" or layout.split.exchange not in ("gather", "tokens"):
        return tokens * active
    if layout.split.exchange == "gather":
        return n * tokens * active
    worst = worst_rooms(tokens, active, router.experts // n)
    rounds = transport(backend, n * worst.results * row_bytes) == "rounds"
    return n * (even_rooms(tokens, active, router.experts // n, n) if rounds else worst).results


def _meeting(layout: Layout, times: int, s: Shape, once: bool) -> tuple[Collective, ...]:
    """The exchange of one layer, with buffers of the sizes that `sharding.exchange_cost` counts; `once`: one wave of experts, as compilers count."""
    axes, exchange = layout.experts, layout.split.exchange
    if exchange == "gather":
        rows = s.devices * s.tokens * s.nbytes
        return (
            Collective("gather tokens", times, "all_gather", axes, rows * (s.width + s.active)),
            Collective("scatter results", times, "reduce_scatter", axes, rows * s.active * s.width),
        )
    whole = traffic(exchange, s) * s.devices / (s.devices - 1)
    if exchange == "weights":
        return (Collective("experts to tokens", times, "all_gather", axes, whole / waves(s) if once else whole),)
    turns = 1 if exchange == "coherent" else 2
    return (Collective("exchange tokens", times * turns, "all_to_all", axes, whole / turns),)
