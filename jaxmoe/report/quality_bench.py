"""What the precision ladder gives up and what it saves, on held-out text: every setting beside the exact run, with intervals over prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.load import Checkpoint
from jaxmoe.engine.model import Offload, load_model, read_store
from jaxmoe.experts.lossy import STORED, Lossy
from jaxmoe.experts.planes import build_planes, plane_format
from jaxmoe.offload import ladder
from jaxmoe.report import quality
from jaxmoe.train.corpus import load_corpus
from pallas_kernels.dispatch import Kernels

BITS = (2, 3, 4, 8)
HALF = 2
"""Of three texts of a domain one is for calibrating."""


def settings(layers: int, experts: int) -> dict[str, Lossy]:
    """What is compared, by name."""

    def all_at(bits: int) -> Lossy:
        return Lossy(widths=((bits,) * experts,) * layers)

    return {
        "lossless": Lossy(),
        "hobbit, 4 bits": Lossy(high=0.6, low=0.9, low_bits=4),
        "hobbit, 2 bits": Lossy(high=0.6, low=0.9, low_bits=2),
        "drop-cold 0.5": Lossy(cold=0.5),
        "drop-cold 0.75": Lossy(cold=0.75),
        "drop-cold 1": Lossy(cold=1.0),
        "cache-prior 0.05": Lossy(prior=0.05),
        "cache-prior 0.1": Lossy(prior=0.1),
        "cache-prior 0.2": Lossy(prior=0.2),
        **{f"all misses at {bits} bits": all_at(bits) for bits in reversed(BITS)},
    }


def run(
    checkpoint: Checkpoint, corpus: Path, domains: tuple[str, ...], per_domain: int, tokens: int, slots: int,
    tell: Callable[[str], None] = lambda what: None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Measures all settings, with a policy of lfu.

    Args:
        checkpoint: the model, run in float32 on the CPU.
        corpus: a folder that `scripts/train.py corpus` wrote.
        domains, per_domain, tokens: held-out texts.
        slots: of each layer.
        tell: is told what is done next.

    Returns:
        A row a setting, and the exact run's figures.
    """
    model = load_model(checkpoint, "float32", Kernels("cpu"), unroll=False)
    spec, kernels = model.spec, model.kernels
    records, fmt = read_store(checkpoint, spec, layout=kernels.expert_layout), plane_format(spec, kernels.expert_layout)
    tell("planes of all experts")
    planes = build_planes(fmt, records)
    texts = np.concatenate([quality.held_out(load_corpus(corpus), [domain], per_domain, tokens) for domain in domains])
    calibrating = np.arange(len(texts)) % per_domain % 3 == HALF
    model = dataclasses.replace(model, bank=quality.evaluation_bank(spec, records, fmt, planes, BITS, Offload(slots, 2, "lfu")))
    judged, own = texts[~calibrating], texts[calibrating]

    def size(bits: int) -> int:
        """Beside bfloat16, in which checkpoints are."""
        return fmt.weights * 2 if bits == STORED else fmt.bytes(bits)

    tell("exact")
    exact, counted = quality.nats_at_once(model, judged)
    exact_own, _ = quality.nats_at_once(model, own)
    found = settings(len(spec.moe_layers), spec.moe[0].experts)

    def lost(prior: float) -> float:
        tell(f"calibrating cache-prior: {prior:.3f}")
        return float((quality.nats_at_once(quality.with_setting(model, Lossy(prior=float(prior))), own)[0] - exact_own).mean())

    best = ladder.calibrate(lost, float(np.log(1.01)), high=0.32, steps=5)
    found[f"cache-prior {best.value:.2f}, calibrated to 1 %"] = Lossy(prior=best.value)
    rows = []
    for name, lossy in found.items():
        tell(name)
        nats, counts = quality.nats_at_once(quality.with_setting(model, lossy), judged)
        rows.append(quality.quality(name, nats, counts, exact, counted, size).record() | {"bit_equal": bool((nats == exact).all())})
    rate = float(counted["hits"].sum() / counted["requests"].sum())
    return rows, {"perplexity": float(np.exp(exact.mean())), "prompts": len(judged), "tokens": tokens, "hit_rate": rate}
