"""Runs of a resident model for what they say about it: which experts its tokens ask for, and how long a decode step takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxmoe.engine.generate import Engine, Request
from jaxmoe.engine.memory import free_device_bytes
from jaxmoe.engine.model import Model
from jaxmoe.engine.predicting import can_ask_ahead
from jaxmoe.offload.budget import ExpertShapes, format_bytes
from jaxmoe.offload.trace import Trace
from jaxmoe.spec import ModelSpec

TIMED = 64
"""Tokens that each sequence is continued by for the time of a step."""


def check_room(spec: ModelSpec) -> None:
    """Refuses a model whose experts don't all fit on the device, before any weights are read.

    Raises:
        ValueError: with the bytes, as far as the device says what it has.
    """
    shapes = ExpertShapes.from_spec(spec)
    free = free_device_bytes(shapes, 0)
    if free is not None and shapes.all_bytes > free:
        held = f"{format_bytes(shapes.all_bytes)} of experts don't fit into the {format_bytes(free)} that the device has left"
        raise ValueError(f"{held}, and here all of them have to be there: use a larger device, or a CPU (JAX_PLATFORMS=cpu)")


def observed(model: Model, requests: Sequence[Request], eos: Sequence[int], ahead: bool = False) -> Trace:
    """Greedy runs, recorded.

    Args:
        model: with all experts on one device.
        requests: run together.
        eos: ids that end a text.
        ahead: record also what routers foretell of later layers, if the model's can be asked.
    """
    longest = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
    engine = Engine(model, len(requests), longest, True, eos, record=True, gates=ahead and can_ask_ahead(model.spec))
    engine.generate(requests)
    return engine.trace()


def step_seconds(model: Model, requests: Sequence[Request]) -> float:
    """Seconds of a decode step of these requests together, each continued by `TIMED` tokens, or as many as half the model's positions take."""
    tokens = min(TIMED, model.spec.max_positions // 2 - 1)
    most = model.spec.max_positions - tokens - 1
    asked = [dataclasses.replace(r, prompt_ids=r.prompt_ids[-most:], max_new_tokens=tokens + 1) for r in requests]
    engine = Engine(model, len(asked), max(len(r.prompt_ids) + r.max_new_tokens for r in asked), True)
    engine.warm_up(requests=asked)
    _, timings = engine.generate(asked)
    return timings.decode_seconds / timings.decode_steps
