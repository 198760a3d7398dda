"""Part `torch` of the kernels' measurement: torch's grouped matmul (Triton or CUTLASS, as it chooses) and attention at the same shapes.

jax must not hold the GPU in this process. Calls are captured in one CUDA graph, each with other operands than the last, as ours are one program.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

from jaxmoe.report import record
from jaxmoe.report.device_bench import Found, path_of
from jaxmoe.report.kernel_bench import AttentionCase, Bench, attention_cases, random_routing

CALLS = 12


def peers(bench: Bench) -> None:
    """Writes the records of part `torch`."""
    for model, tokens in bench.sizes.rivals:
        shape = bench.sizes.models[model]
        settings = {"op": "torch grouped_mm", "model": model, "tokens": tokens, "form": "bfloat16", **dataclasses.asdict(shape)}
        _attempt(bench, f"kernel-torch-matmul-{model}-t{tokens}", settings, lambda m=model, t=tokens: _matmul(bench, m, t))  # type: ignore[misc]
    for case in attention_cases(bench.sizes):
        if case.form == "bfloat16":
            _attempt(bench, f"kernel-torch-attention-{case.stem}", case.settings | {"op": "torch sdpa"}, lambda c=case: _attention(bench, c))  # type: ignore[misc]


def _attempt(bench: Bench, stem: str, settings: dict, measure: Callable[[], Found]) -> None:
    """`Bench.attempt`; the record names torch's device and version, since jax sees only the CPU here."""
    try:
        import torch
    except ImportError:
        bench.attempt("kernel_torch", stem, settings, measure, "torch is not installed")
        return
    if not torch.cuda.is_available():
        bench.attempt("kernel_torch", stem, settings, measure, "torch sees no GPU")
        return
    bench.attempt("kernel_torch", stem, settings, measure)
    torch.cuda.empty_cache()
    path = path_of(bench.out, bench.sizes.tiny, stem)
    made = json.loads(path.read_text(encoding="utf-8"))
    made["device"] |= {"platform": "gpu", "kind": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
    made["versions"] |= {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    record.write_record(path, made)


def _seconds(calls: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds of a call, `repeats` samples of all of them in a CUDA graph."""
    import torch

    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    out = []
    for _ in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        out.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return out[1:]


def _matmul(bench: Bench, model: str, tokens: int) -> Found:
    import torch

    shape, routing = bench.sizes.models[model], random_routing(bench.sizes.models[model], tokens)
    grouped = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    w = torch.randn(shape.experts, shape.width, shape.hidden, dtype=torch.bfloat16, device="cuda") * shape.hidden**-0.5
    x = torch.randn(tokens * shape.active, shape.hidden, dtype=torch.bfloat16, device="cuda")
    step = max(1, shape.experts // 3)
    ends = torch.tensor(routing.sizes, device="cuda").cumsum(0).to(torch.int32)
    turned = [w.roll(i * step, 0).transpose(1, 2) for i in range(3)] if w.nbytes < 4e9 else [w.transpose(1, 2)]
    samples = _seconds([lambda i=i: grouped(x, turned[i % len(turned)], offs=ends) for i in range(CALLS)], bench.sizes.repeats)  # type: ignore[misc]
    timing = record.timing(samples)
    asked = int((routing.sizes > 0).sum())
    moved = shape.width * shape.hidden * 2 * asked
    return Found({"call": timing}, {"experts": asked}, bench.bound(moved, 2 * tokens * shape.active * shape.width * shape.hidden, timing["median"]))


def _attention(bench: Bench, case: AttentionCase) -> Found:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    shape, copies = case.shape, 3
    q = torch.randn(case.sequences, shape.heads, case.rows, shape.head_dim, dtype=torch.bfloat16, device="cuda")
    keys = torch.randn(copies, case.sequences, shape.kv_heads, case.keys, shape.head_dim, dtype=torch.bfloat16, device="cuda")
    values = keys[..., : shape.value_dim] if shape.latent else torch.randn_like(keys)
    mask = causal_lower_right(case.rows, case.keys) if case.rows > 1 else None
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def call(i, backend=backend):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, keys[i % copies], values[i % copies], attn_mask=mask, enable_gqa=True)

        try:
            found[backend.name.lower()] = record.timing(_seconds([lambda i=i: call(i) for i in range(CALLS)], bench.sizes.repeats))  # type: ignore[misc]
        except RuntimeError:
            continue
    if not found:
        raise ValueError(f"torch has no flash or cuDNN attention for head_dim {shape.head_dim}, heads {shape.heads} of {shape.kv_heads}")
    best = min(timing["median"] for timing in found.values())
    moved = (keys.nbytes + (0 if shape.latent else values.nbytes)) / copies
    operations = 2 * case.sequences * case.rows * (case.keys - (case.rows - 1) / 2) * shape.heads * (shape.head_dim + shape.value_dim)
    return Found(found, {}, bench.bound(moved, operations, best), settings={"window": None, "cache": "contiguous"})
