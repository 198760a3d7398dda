"""Routing traces by domain: a model continues held-out text of every domain, and its routing is recorded with what its gates foretell.

Policies and predictors are fitted to some domains and judged on others with them.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int32

from jaxmoe.engine.generate import Engine, Request, Sampling
from jaxmoe.engine.model import Model
from jaxmoe.offload.trace import AHEAD, DECODE, PHASES, WIDTH, Trace, load, save
from jaxmoe.train.corpus import Corpus, load_corpus, windows


def record_domains(
    model: Model,
    text: Corpus | str | Path,
    prompts_per_domain: int = 20,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    seed: int = 0,
    domains: Sequence[str] | None = None,
    gates: bool = True,
    progress: Callable[[str], None] = lambda domain: None,
) -> dict[str, Trace]:
    """Records a trace a domain: prompts are windows of held-out text, spread evenly over it, continued at temperature 1.

    A domain's prompts run side by side; every sequence's bits are those of a run alone (`jaxmoe.offload.sequences.by_sequence` takes them apart).

    Args:
        model: what to run.
        text: a corpus, the folder of one, or a folder with a `<domain>.npy` of uint16 tokens for each domain.
        prompts_per_domain: sequences of a domain, at most; fewer where its text is short.
        prompt_tokens: of each prompt.
        new_tokens: generated after each; no text ends earlier.
        seed: of the draws. Each sequence's draws depend on it, on the domain's name and on the sequence's number.
        domains: which; all if not given.
        gates: record what routers foretell as well.
        progress: called with each domain's name before it runs.

    Returns:
        Domain -> trace. Its meta data say domain, prompts, prompt_tokens, new_tokens, temperature and seed.

    Raises:
        ValueError: there is no such domain, or a domain's text is shorter than a prompt; names it.
    """
    corpus = text if isinstance(text, Corpus) else open_text(Path(text))
    chosen = corpus.domains if domains is None else tuple(domains)
    if unknown := [name for name in chosen if name not in corpus.domains]:
        raise ValueError(f"no domain {unknown[0]!r} in {corpus.folder}; it has {', '.join(corpus.domains)}")
    about = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "temperature": 1.0, "seed": seed}
    out = {}
    for domain in chosen:
        progress(domain)
        prompts = _prompts(corpus, domain, prompts_per_domain, prompt_tokens)
        out[domain] = _record(model, domain, prompts, new_tokens, seed, gates, about)
    return out


def open_text(folder: Path) -> Corpus:
    """The corpus of a folder, or one of the `<domain>.npy` streams in it, all of them held out.

    Raises:
        ValueError: there are no streams, or one is not of uint16 tokens.
    """
    if (folder / "corpus.json").exists():
        return load_corpus(folder)
    streams = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
    if not streams:
        raise ValueError(f"{folder}: neither corpus.json nor token streams (.npy) are there")
    for domain, tokens in streams.items():
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(f"{folder / domain}.npy: {tokens.dtype}{list(tokens.shape)}, expected one row of uint16 tokens")
    return Corpus(folder, {"domains": dict.fromkeys(streams)}, {"train": {}, "held_out": streams})


def _prompts(corpus: Corpus, domain: str, count: int, tokens: int) -> Int32[np.ndarray, "N T"]:
    found = windows(corpus, domain, tokens, most=count)[:, :tokens]
    if len(found) == 0:
        raise ValueError(f"held-out text of {domain!r} has {len(corpus.streams['held_out'][domain])} tokens, a prompt needs {tokens + 1}")
    return found


def _record(model: Model, domain: str, prompts: np.ndarray, new_tokens: int, seed: int, gates: bool, about: Mapping) -> Trace:
    """One domain's sequences, side by side."""
    first = zlib.crc32(f"{domain} {seed}".encode())
    requests = [Request(tuple(map(int, ids)), new_tokens, Sampling(temperature=1.0, seed=(first + i) % 2**32)) for i, ids in enumerate(prompts)]
    engine = Engine(model, len(requests), prompts.shape[1] + new_tokens, greedy=False, record=True, gates=gates)
    engine.generate(requests)
    trace = engine.trace()
    phases = {PHASES[phase]: int((trace.phase == phase).sum()) for phase in np.unique(trace.phase)}
    more = {"source": f"held-out text: {domain}", "domain": domain, "prompts": len(prompts), "tokens": phases, **about}
    return dataclasses.replace(trace, meta={**trace.meta, **more})


def save_domains(folder: str | Path, traces: Mapping[str, Trace]) -> None:
    """Writes a `<domain>.npz` for each trace; the folder is made if it isn't there.

    Raises:
        OSError: a file can't be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for domain, trace in traces.items():
        save(folder / f"{domain}.npz", trace)


def load_domains(folder: str | Path) -> dict[str, Trace]:
    """Reads what `save_domains` wrote: every .npz of a folder, by name.

    Raises:
        ValueError: there is none, or one is no trace.
    """
    paths = sorted(Path(folder).glob("*.npz"))
    if not paths:
        raise ValueError(f"{folder}: there are no traces (.npz)")
    return {path.stem: load(path) for path in paths}


def gate_recall(trace: Trace, phase: int = DECODE) -> Float[np.ndarray, "L K n"]:
    """The share of the experts that a layer's tokens chose which an earlier layer's gates had among their first A, 2 A and 3 A.

    Args:
        trace: with gates.
        phase: of the tokens that count.

    Returns:
        float64 [L, K, WIDTH]: by the layer foretold, the distance (1 to K) and the width; NaN where no layer is so far before.

    Raises:
        ValueError: the trace has no gates, or no such tokens.
    """
    kept = trace.phase == phase
    if trace.gates is None or not kept.any():
        raise ValueError(f"a trace with gates and with tokens of the phase {PHASES[phase]!r} is needed")
    ids, gates = trace.ids[kept], trace.gates[kept]
    _, layers, active = ids.shape
    out = np.full((layers, AHEAD, WIDTH), np.nan)
    for layer in range(layers):
        for distance in range(1, min(AHEAD, layer) + 1):
            found = ids[:, layer, :, None] == gates[:, layer - distance, distance - 1, None, :]
            there = np.cumsum((found & (ids[:, layer, :, None] >= 0)).sum(1), axis=-1)[:, active - 1 :: active]
            out[layer, distance - 1] = there.sum(0) / (ids[:, layer] >= 0).sum()
    return out
