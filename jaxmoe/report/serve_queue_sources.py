"""Queues of mixed domains for measuring the serving engine, and what foretells their experts: as they run, by other text, or by the truth."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.engine.generate import Sampling
from jaxmoe.engine.model import Model
from jaxmoe.engine.serving.paths import by_token_seen
from jaxmoe.engine.serving.requests import ServeRequest
from jaxmoe.engine.serving.runner import Runner
from jaxmoe.engine.text import Tokenizer
from jaxmoe.offload import request_paths
from jaxmoe.offload.predictors import PREDICTORS, sizes_of
from jaxmoe.offload.predictors.interface import one_hot
from jaxmoe.offload.request_paths import PathSource
from jaxmoe.offload.trace import DECODE, Trace, model_meta
from jaxmoe.report.regroup_bench import Recorded, oracle
from jaxmoe.report.serve_load import Sizes
from jaxmoe.train.corpus import Corpus, split, windows
from jaxmoe.train.sources import MissingText, domains, load

PROMPT, NEW = 32, Sizes(32, 0.5, 8, 96)
"""Tokens of a prompt, and of an answer."""


@dataclasses.dataclass(frozen=True)
class Queue:
    """Attributes: `requests`, in order of arrival, all there at the beginning; `domains` of each."""

    requests: tuple[ServeRequest, ...]
    domains: tuple[str, ...]


def installed_text(tokenizer: Tokenizer, tokens: int = 16_000) -> Corpus:
    """The domains of `jaxmoe.train.sources` whose files are on this machine, at least the sources of Python's library; split as for training.

    Args:
        tokenizer: of the model.
        tokens: of each domain and split, about.
    """
    streams: dict[str, dict[str, np.ndarray]] = {"train": {}, "held_out": {}}
    for domain in domains():
        try:
            documents = load(domain)
        except MissingText:
            continue
        for name, part in zip(streams, split(documents), strict=True):
            ids: list[int] = []
            for _, passage in part:
                ids += tokenizer.encode(passage) if len(ids) < tokens else []
            streams[name][domain.name] = np.asarray(ids[:tokens], np.uint16)
    return Corpus(Path(), {"domains": dict.fromkeys(streams["train"])}, streams)


def mixed_queue(text: Corpus, count: int = 256, seed: int = 0, part: str = "held_out", prompt: int = PROMPT, new: Sizes = NEW) -> Queue:
    """Requests of all domains of a corpus in equal parts, shuffled: windows of its text, continued at temperature 1; no text ends earlier.

    Raises:
        ValueError: the text is too short for so many.
    """
    each = -(-count // len(text.domains))
    found = [(domain, tuple(map(int, ids[:prompt]))) for domain in text.domains for ids in windows(text, domain, prompt, part, most=each)]
    if len(found) < count:
        raise ValueError(f"the {part} text of {len(text.domains)} domains has {len(found)} windows of {prompt} tokens: give {count}, or more text")
    rng = np.random.default_rng([seed, 11])
    chosen = [found[i] for i in rng.permutation(len(found))[:count]]
    lengths = new.draw(count, rng).tolist()
    how = [Sampling(1.0, seed=seed + i) for i in range(count)]
    requests = [ServeRequest(ids, n, sampling, ignore_eos=True) for (_, ids), n, sampling in zip(chosen, lengths, how, strict=True)]
    return Queue(tuple(requests), tuple(domain for domain, _ in chosen))


class Recording:
    """In the place of `RequestPaths`, for a run that learns every sequence's routing. Attributes: `parts` of each id: (tokens, experts)."""

    def __init__(self) -> None:
        self.parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def of(self, state: Any, live: Any, runner: Any) -> tuple[None, None]:
        return None, None

    def learn(self, plan: Any, given: Any, live: Any, runner: Runner) -> None:
        for call in runner.routed:
            for id, _, tokens, experts in call.by_sequence():
                self.parts.setdefault(id, []).append((tokens, experts))

    def sequence(self, id: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and experts of all that a request decoded; of its prompt nothing is known, which went by groups of layers."""
        tokens, experts = zip(*self.parts[id], strict=True)
        return np.concatenate(tokens), np.concatenate(experts)


def trace_of(model: Model, recording: Recording) -> Trace:
    """What was decoded, as a trace; the routers' weights were not kept, and all count alike."""
    parts = [recording.sequence(id) for id in recording.parts]
    tokens, ids = (np.concatenate([part[k] for part in parts]) for k in range(2))
    numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part[0]) for part in parts])
    phase, step = np.full(len(tokens), DECODE, np.uint8), np.arange(len(tokens), dtype=np.int32)
    meta = model_meta(model.spec, "a model", "a queue of other text")
    return Trace(ids.astype(np.int16), np.ones(ids.shape, np.float16), tokens.astype(np.int32), numbers, phase, step, meta)


def sources(model: Model, queue: Queue, truth: Recording, other: Trace | None, path: Any = None) -> dict[str, tuple[PathSource, int | None]]:
    """By name, each with how many tokens without routing it is told (`RequestPaths`): learned while serving, from other text, and the truth.

    Args:
        model, queue: that are measured.
        truth: a recording of that queue.
        other: of other text; sources that are fitted are left out without one.
        path: a trained path predictor (`jaxmoe.train.path_predictor.train`); left out without one.
    """
    router, _ = model.spec.moe
    layers, experts, active = len(model.spec.moe_layers), router.experts, router.active
    prior = np.full((layers, experts), active / experts, np.float32) if other is None else _mean(other)
    previous = PREDICTORS["previous"]
    fitted = previous.fit([], sizes=sizes_of(model.spec))
    out: dict[str, tuple[PathSource, int | None]] = {
        "previous token": (request_paths.by_predictor(previous, fitted), 0), "own routing": (request_paths.recent(prior), 0),
        "token, learned": (by_token_seen(layers, experts, active), 0),
    }  # fmt: skip
    if other is not None:
        out["token"] = (request_paths.by_token([other]), 0)
    if path is not None:
        out["path predictor"] = (request_paths.by_predictor(PREDICTORS["path"], path), path.settings.window)
    known = []
    for i, request in enumerate(queue.requests):
        tokens, ids = truth.sequence(i)
        prompt = np.asarray(request.prompt_ids)
        unknown = np.full((len(prompt), layers, active), -1, ids.dtype)
        known.append(Recorded(queue.domains[i], np.concatenate([prompt, tokens]), np.concatenate([unknown, ids]), len(prompt)))
    return out | {"oracle": (oracle(known, experts, 1), None)}


def _mean(trace: Trace) -> np.ndarray:
    return one_hot(trace.ids, trace.experts).mean(0, dtype=np.float32)
