"""What a model's experts give on some text: it runs as it always does, in the compiled prefill, with a bank that keeps their largest outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32

from jaxmoe.engine.generate import Engine, Request, check_requests
from jaxmoe.engine.model import Model
from jaxmoe.experts import ResidentBank
from jaxmoe.experts.measured import MeasuredBank

ROWS = 8
"""Sequences at a time: each has its own cache of keys and values."""


def measure_experts(
    model: Model, prompts: Sequence[Sequence[int]], progress: Callable[[int, int], None] = lambda done, total: None
) -> Float32[np.ndarray, "L E"]:
    """The largest |output| of every expert's down projection over all tokens of some prompts, before the router's weight.

    Args:
        model: with all experts on one device.
        prompts: ids of each.
        progress: called with prompts read and prompts in all.

    Returns:
        By layer, among those that have experts, and expert; 0 for an expert that no token was routed to.

    Raises:
        RequestError: a prompt that the model can't read.
        ValueError: a model whose experts are not all on one device.
    """
    if not isinstance(model.bank, ResidentBank) or model.on.mesh is not None:
        raise ValueError("experts are measured where all of them are on one device: load the model without expert memory and split")
    requests = [Request(tuple(ids), 1) for ids in prompts]
    check_requests(model.spec, requests)
    watched = dataclasses.replace(model, bank=MeasuredBank(model.bank))
    engine = Engine(watched, min(ROWS, len(requests)), 1 + max(len(r.prompt_ids) for r in requests), True)
    for at in range(0, len(requests), engine.rows):
        engine.generate(requests[at : at + engine.rows])  # one token each, which prefill gives: nothing is decoded
        progress(min(at + engine.rows, len(requests)), len(requests))
    return np.asarray(engine.experts())
