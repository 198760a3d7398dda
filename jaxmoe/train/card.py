"""From a finished run to the folder that ships: Hugging Face layout, bfloat16, and a card whose figures are measured on what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.export import export_hf
from checkpoints.families import flatten
from jaxmoe import formats
from jaxmoe.experts import ResidentBank
from jaxmoe.spec import ModelSpec
from jaxmoe.train import evaluate, loop
from jaxmoe.train.corpus import Corpus

_FILES = ("tokenizer.json", "tokenizer_config.json")


def export(spec: ModelSpec, config: dict, corpus: Corpus, run: Path, out: Path, settings: loop.TrainConfig) -> dict:
    """Writes the last state of `run` to `out`, then measures the rounded weights on held-out text and writes the card.

    Returns:
        The figures, also in `out/training.json`.

    Raises:
        ValueError: the run has no saved state.
    """
    like = jax.eval_shape(lambda: loop.init_state(spec, settings))
    checkpoints = loop.Checkpoints(run / "state")
    state = checkpoints.restore(like)
    checkpoints.close()
    if state is None:
        raise ValueError(f"{run}: holds no saved state")
    params, experts = loop.to_layered(spec, state.params, state.bank)
    leaves = flatten({"params": params, "experts": experts})
    size = export_hf(spec, leaves, config, out, "bfloat16")
    for name in _FILES:
        shutil.copyfile(corpus.folder / name, out / name)
    eos = config["eos_token_id"]
    (out / "model.safetensors").chmod(0o644)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "do_sample": False}, indent=2) + "\n")

    def rounded(x):
        return formats.load(formats.store(jnp.asarray(x), "bfloat16"), jnp.float32)

    bank = ResidentBank(rounded(state.bank.w_in), rounded(state.bank.w_out))
    losses, routes = evaluate.held_out(evaluate.make_scorer(spec, jax.tree.map(rounded, state.params), bank), corpus)
    router, _ = spec.moe
    slots = router.experts // 4
    hit = float(np.mean([evaluate.lru_hit_rate(ids, slots) for ids in routes.values()]))
    figures = {
        "steps": int(state.step),
        "rows": [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1:],
        "settings": settings.__dict__ | {"steps": int(state.step)},
        "held_out": losses,
        "mean_bits_per_byte": float(np.mean([v["bits_per_byte"] for v in losses.values()])),
        "lru": {"slots": slots, "experts": router.experts, "hit_rate": hit},
        "bytes": size,
    }
    (out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "README.md").write_text(card(spec, corpus, figures))
    return figures


def card(spec: ModelSpec, corpus: Corpus, figures: dict) -> str:
    """The model card, in markdown."""
    router, experts = spec.moe
    s, lru = figures["settings"], figures["lru"]
    total = sum(d["train"]["tokens"] for d in corpus.manifest["domains"].values())
    seen = figures["steps"] * s["batch"] * s["length"]
    rows = "\n".join(
        f"| {name} | {d['description']} | {d['licence']} | {d['train']['bytes'] / 1e6:.1f} | {figures['held_out'][name]['nats_per_token']:.3f} "
        f"| {figures['held_out'][name]['bits_per_byte']:.3f} |"
        for name, d in corpus.manifest["domains"].items()
    )
    return f"""# The model that ships with jaxmoe

A small Mixture-of-Experts language model in the layout of `{spec.family}`, trained from scratch by `scripts/train.py` of this repository: {spec.n_layers} layers of
width {spec.width}, {router.experts} experts of width {experts.width} a layer, {router.active} active, a byte-level BPE of {spec.vocab} tokens; {figures["bytes"] / 1e6:.1f} MB in bfloat16.
It is here so that every tool of the repository has real trained weights and real routing to work on. It writes plausible fragments of what it was
trained on, and knows nothing.

- Trained for {figures["steps"]} steps of {s["batch"]} x {s["length"]} tokens, seed {s["seed"]}: {seen / 1e6:.1f} M tokens out of {total / 1e6:.1f} M.
- Held out (text of the same works that was not trained on): **{figures["mean_bits_per_byte"]:.3f} bits per byte** on average over the domains.
- Routing: a least-recently-used cache of {lru["slots"]} of {lru["experts"]} experts a layer hits {100 * lru["hit_rate"]:.1f} % on held-out text; even routing would hit {100 * lru["slots"] / lru["experts"]:.1f} %.
- The tokens `<|im_start|>` and `<|im_end|>` of the chat template stand in no training text.
- Weights: Apache-2.0, like the repository. The texts and their licences:

| domain | text | licence | train MB | held-out nats per token | held-out bits per byte |
|---|---|---|---|---|---|
{rows}

WordNet's glosses: WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.
"""
