"""Engines to be measured: with experts sent by the host over an emulated link, and with compiled steps that fetch them; and what is asked of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxmoe.engine.model import Model
from jaxmoe.engine.serving.core import ServingEngine
from jaxmoe.engine.serving.host_programs import HostPrograms
from jaxmoe.engine.serving.runner import Runner
from jaxmoe.engine.serving.scheduler import Policy
from jaxmoe.engine.serving.types import ServeSpec
from jaxmoe.engine.text import Tokenizer
from jaxmoe.experts.source import ExpertSource
from jaxmoe.offload.link import Link
from jaxmoe.report.device_bench import MIB, pinned, seconds_of, to_device
from jaxmoe.report.device_traced import make_bank, make_params, make_records, slots_of, spec_of
from jaxmoe.report.serve_bench import Arm, Ready, Scene, spec_for
from pallas_kernels.dispatch import Kernels

Texts = Callable[[int, int], tuple[int, ...]]
"""`(which, tokens) -> ids`."""


def host_engine(model: Model, records: Any, spec: ServeSpec, policy: Policy, link: Link, tokenizer: Tokenizer | None = None) -> ServingEngine:
    """An engine whose host sends experts over a link.

    Args:
        model: with a slot bank; its store is not used.
        records: [L * E, rows, columns], its experts.
        spec, policy: of the engine.
        link: emulated or not.
        tokenizer: for text; ids alone without one.
    """
    model = dataclasses.replace(model, bank=dataclasses.replace(model.bank, store=None))
    run = HostPrograms(model, spec, ExpertSource(model.spec, np.asarray(records)), link)
    return ServingEngine(Runner(model, spec, run=run), tokenizer, (), policy)


def linked(model: Model, records: Any, arms: Sequence[Arm], scenes: Sequence[Scene], gbps: float) -> list[Ready]:
    """Every arm for every scene, each over an emulated link of its own."""
    chunk, out = smallest(arms), []
    for scene in scenes:
        for arm in arms:
            link = Link(gbps)
            engine = host_engine(model, records, spec_for(arm, scene, chunk), Policy(prefill=arm.prefill), link)
            out.append(Ready(arm, scene, engine, link))
    return out


def fused(model: Model, arms: Sequence[Arm], scenes: Sequence[Scene]) -> list[Ready]:
    """Every arm for every scene, by compiled steps, experts and all."""
    chunk = smallest(arms)
    pairs = [(arm, scene) for scene in scenes for arm in arms]
    return [
        Ready(a, s, ServingEngine(Runner(model, spec_for(a, s, chunk)), None, (), Policy(prefill=a.prefill))) for a, s in pairs
    ]


def smallest(arms: Sequence[Arm]) -> int:
    """Tokens of the smallest chunk of any arm, which says how many steps the slowest takes."""
    return min(arm.chunk for arm in arms)


# --- What they are asked


def random_texts(vocabulary: int, seed: int = 0) -> Texts:
    """Ids drawn evenly; a text's ids are the same for the same `which`."""

    def text(which: int, tokens: int) -> tuple[int, ...]:
        return tuple(np.random.default_rng([seed, which]).integers(min(8, vocabulary - 1), vocabulary, tokens).tolist())

    return text


def passages(tokenizer: Tokenizer, text: str) -> Texts:
    """Passages of a text, from places spread over it, which goes on at its beginning where it ends."""
    ids = np.asarray(tokenizer.encode(text), np.int64)
    if not len(ids):
        raise ValueError("the text that prompts are taken from is empty")

    def passage(which: int, tokens: int) -> tuple[int, ...]:
        start = int(which * 0.6180339887 % 1 * len(ids))  # no two near each other
        return tuple(np.resize(np.roll(ids, -start), tokens).tolist())

    return passage


# --- A model for a GPU


def generated_model(layers: int, percent: int, fields: dict[str, Any] | None = None, kernels: Kernels | None = None) -> Model:
    """Layers of Qwen3-30B-A3B's shapes with random weights, experts in pinned host memory, so many percent of them on the device.

    Args:
        layers: of them.
        percent: resident.
        fields: of its config.json, others in their place; a quarter of the vocabulary if not given, for a quarter of the layers.
        kernels: the backend's own if not given.
    """
    from jaxmoe.experts import host_store

    kernels = kernels or Kernels.default()
    given = {"vocab_size": 37984} if fields is None else fields
    spec = spec_of(given, layers, given.get("num_experts_per_tok", 8))
    bank = make_bank(spec, host_store.pinned(make_records(spec)), slots_of(spec, percent), None, kernels)
    return Model(spec, make_params(spec), bank, kernels)


def measured_link(mib: int = 64) -> float:
    """10^9 bytes per second from pinned host memory to the default device; the best of a few copies of so many MiB."""
    x = pinned(np.ones(mib * MIB, np.uint8))
    return mib * MIB / min(seconds_of(lambda: jax.block_until_ready(to_device(x)), 7)) / 1e9
