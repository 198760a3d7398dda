"""Long prompts that arrive while others decode, on the default device: compiled steps, experts in pinned host memory, a generated model.

Its layers have a real model's shapes and random weights; a random router spreads tokens over all experts, so decoding finds fewer of them on the device
than a trained one would. Of prompts this size every model asks for nearly all experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmoe.report import serve_bench, serve_judge, serve_setups
from jaxmoe.report.device_bench import SMALL_MODEL
from jaxmoe.report.serve_bench import Arm, Scene


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is. Attributes: `layers`; `model`, fields of its config.json, None for Qwen3-30B-A3B's; `prompts` that arrive together, of
    `tokens`, and one of `alone`; `streams` that decode; `calm` tokens before; `chunk`, where nobody says otherwise; `link_mib` of a copy that is timed;
    `rounds`."""

    layers: int
    model: Mapping[str, Any] | None
    prompts: int
    tokens: int
    alone: int
    streams: int
    calm: int
    chunk: int
    link_mib: int
    rounds: int

    def scenes(self) -> list[Scene]:
        """Prompts together, then one alone."""
        return [
            Scene(f"{self.prompts} together", self.prompts, self.tokens, streams=self.streams, calm=self.calm),
            Scene("1 alone", 1, self.alone, streams=self.streams, calm=self.calm),
        ]


FULL = Sizes(12, None, 4, 2048, 8192, 8, 32, 256, 64, 3)
TINY = Sizes(2, {**SMALL_MODEL, "num_experts": 8, "num_experts_per_tok": 2}, 2, 96, 128, 2, 6, 32, 1, 1)
"""For a check of the code on any device; its numbers mean nothing."""


def measure(sizes: Sizes, arms: Sequence[Arm], percent: int, rounds: int, tell: Callable[[str], None] = lambda what: None) -> dict[str, dict[str, Any]]:
    """Every arm for every scene.

    Args:
        sizes: see there.
        arms: of `serve_bench.arms`.
        percent: of the experts that are on the device.
        rounds: of every arm.
        tell: is told what comes next.

    Returns:
        Records by their files' stems; the link's speed is measured, of copies from pinned host memory.
    """
    tell("generating the model")
    model = serve_setups.generated_model(sizes.layers, percent, None if sizes.model is None else dict(sizes.model))
    gbps = serve_setups.measured_link(sizes.link_mib)
    texts = serve_setups.random_texts(model.spec.vocab)
    ready = serve_setups.fused(model, arms, sizes.scenes())
    samples = serve_bench.rounds(ready, texts, rounds, serve_setups.smallest(arms), tell)
    about = {"model": "generated", "dtype": "bfloat16", "layers": sizes.layers, "slots": list(model.bank.slots), "mode": "fused", "routing": "random"}
    setting = serve_judge.Setting(len(model.bank.slots) * model.bank.experts, model.bank.record_bytes, gbps, False, about | {"percent": percent})
    return serve_judge.records(ready, samples, setting, "serve_device")
