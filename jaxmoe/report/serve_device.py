"""Long prompts that arrive while others decode, on the default device: compiled steps, experts in pinned host memory, a generated model.

Its layers have a real model's shapes and random weights. A random router spreads tokens over all experts, so that decoding finds fewer of them on the
device than a trained one's would; long prompts ask for nearly all experts of any model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxmoe.report import serve_bench, serve_judge, serve_setups
from jaxmoe.report.device_bench import SMALL_MODEL
from jaxmoe.report.serve_bench import Arm, Scene


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        layers, model: of the model, and fields of its config.json; Qwen3-30B-A3B's for None.
        prompts, tokens: that arrive together, and of each.
        alone: tokens of a prompt that arrives alone; 0 for none.
        streams, calm: sequences that decode, and tokens that each has before prompts arrive.
        chunk: the tiny sizes' only one.
        link_mib: of a copy that is timed.
        rounds: of every arm.
    """

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
        kinds = [(f"{self.prompts} together", self.prompts, self.tokens), ("1 alone", 1, self.alone)]
        return [Scene(*kind, streams=self.streams, calm=self.calm) for kind in kinds if kind[2]]


FULL = Sizes(12, None, 4, 2048, 8192, 8, 32, 256, 64, 3)
TINY = Sizes(2, {**SMALL_MODEL, "num_experts": 8, "num_experts_per_tok": 2}, 2, 96, 128, 2, 6, 32, 1, 1)
"""For a check of the code on any device; its numbers mean nothing."""


def measure(
    sizes: Sizes, arms: Sequence[Arm], percent: int, rounds: int, tell: Callable[[str], None] = lambda what: None
) -> Iterator[dict[str, dict[str, Any]]]:
    """Every arm, scene after scene: all arms of a scene hold their experts and pages on the device at a time.

    Args:
        sizes: see there.
        arms: of `serve_bench.arms`.
        percent: of the experts that are on the device.
        rounds: of every arm.
        tell: is told what comes next.

    Yields:
        A scene's records by their files' stems; the link's speed is measured, of copies from pinned host memory.
    """
    tell("generating the model")
    model = serve_setups.generated_model(sizes.layers, percent, None if sizes.model is None else dict(sizes.model))
    gbps = serve_setups.measured_link(sizes.link_mib)
    texts = serve_setups.random_texts(model.spec.vocab)
    about = {"model": "generated", "dtype": "bfloat16", "layers": sizes.layers, "slots_a_layer": list(model.bank.slots), "mode": "fused"}
    about |= {"routing": "random", "percent": percent}
    setting = serve_judge.Setting(len(model.bank.slots) * model.bank.experts, model.bank.record_bytes, gbps, False, about)
    for scene in sizes.scenes():
        ready = serve_setups.fused(model, arms, [scene])
        samples = serve_bench.rounds(ready, texts, rounds, serve_setups.smallest(arms), tell)
        yield serve_judge.records(ready, samples, setting, "serve_device")
