"""Pre-gating a trained model: each router learns to choose from what the layer before it reads, so that a choice is known a layer ahead.

Pre-gated MoE (arXiv:2308.12066) trains the gate of block N to choose for block N+1, and gives the first block a gate of its own besides. Here a
router keeps its weights and its layer, and is handed the previous MoE layer's input (`RouterSpec.pregated`): the same function, and tuning begins
from what the router knows about its own layer instead of from nothing. The paper tunes all weights for 2,048 steps.

It changes what the model computes. What it costs in held-out loss is part of the result, beside a control tuned alike without it (`tune` of the
spec as it was): a model that was not trained to its end gains by any tuning.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from checkpoints.export import export_hf
from checkpoints.families import flatten
from jaxmoe.cache.full import FullState
from jaxmoe.experts import ResidentBank
from jaxmoe.nn.transformer import forward
from jaxmoe.routing.route import RouterOut
from jaxmoe.spec import ModelSpec
from jaxmoe.spec.hf import PREGATED
from jaxmoe.train import loop
from jaxmoe.train.bank import TrainBank
from jaxmoe.train.corpus import Corpus, domain_weights, sample_batch
from jaxmoe.train.evaluate import held_out, make_scorer
from jaxmoe.train.loss import balance_loss, sequences, token_nll, z_loss
from pallas_kernels.dispatch import Kernels

KERNELS = Kernels("cpu", row_invariant=False)


@dataclasses.dataclass(frozen=True)
class PregateConfig:
    """Settings of a run.

    Attributes:
        steps, warmup: of a rate that rises, then falls to zero in a straight line.
        batch, length: sequences in a step, and tokens in each.
        weights: the 'routers' alone are tuned, which of the shipped model regained more in 60 steps than tuning 'all'.
        muon_lr, adam_lr: peaks; routers are AdamW's, as embeddings and norms are (`loop.optimizer`).
        weight_decay: of both.
        distill: weight of the distance between a router's choice and that of the original router, which reads its own layer's input.
        balance, z, capacity, seed: see `loop.TrainConfig`.
    """

    steps: int = 200
    warmup: int = 10
    batch: int = 8
    length: int = 256
    weights: Literal["all", "routers"] = "routers"
    muon_lr: float = 0.004
    adam_lr: float = 1e-3
    weight_decay: float = 0.0
    distill: float = 0.0
    balance: float = 0.01
    z: float = 0.001
    capacity: float = 1.5
    seed: int = 0

    def __post_init__(self):
        if self.weights not in ("all", "routers"):
            raise ValueError(f"weights = {self.weights!r}: choose all or routers")
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: give at least 1")

    @property
    def training(self) -> loop.TrainConfig:
        """The same as `jaxmoe.train.loop` knows it."""
        same = {field.name: getattr(self, field.name) for field in dataclasses.fields(loop.TrainConfig) if field.name != "decay"}
        return loop.TrainConfig(**same, decay=self.steps)


@flax.struct.dataclass
class TuneState:
    """Attributes: `tuned`, the leaves that are tuned, None in the place of others; `fixed` those others; `opt` the optimizer's state."""

    tuned: Any
    fixed: Any
    opt: optax.OptState


def pregated(spec: ModelSpec, on: bool = True) -> ModelSpec:
    """The same model with its routers choosing a layer ahead, or (`on` False) each for its own layer."""

    def of_layer(layer):
        return layer if layer.router is None else dataclasses.replace(layer, router=dataclasses.replace(layer.router, pregated=on))

    segments = tuple(dataclasses.replace(segment, pattern=tuple(map(of_layer, segment.pattern))) for segment in spec.segments)
    return dataclasses.replace(spec, segments=segments)


def of_resident(spec: ModelSpec, params: dict, bank: ResidentBank) -> tuple[dict, TrainBank]:
    """Weights to train from those of a loaded model: float32 and stacked, without an output matrix beside a tied embedding.

    Args:
        spec, params, bank: of the model, in float32 and not unrolled.

    Raises:
        ValueError: weights in another form; says in which they are needed.
    """
    leaves = jax.tree.leaves((params, bank))
    if any(leaf.dtype != jnp.float32 for leaf in leaves) or bank.layout != "d2f":
        raise ValueError("training needs float32 weights in the layout 'd2f': load the model so")
    if isinstance(params["segments"][0][0]["norm_attn"]["scale"], tuple):
        raise ValueError("training needs stacked weights: load the model with unroll=False")
    kept = {name: leaf for name, leaf in params.items() if not (spec.tied and name == "lm_head")}
    return kept, TrainBank(bank.w_in, bank.w_out, activation=bank.activation)


def distance(student: list[RouterOut], teacher: list[RouterOut]) -> Float[Array, ""]:
    """Mean divergence, in nats, of routers' distributions over experts from those of other routers."""

    def of(own: Array, other: Array) -> Array:
        want = jax.nn.log_softmax(other, -1)
        return (jnp.exp(want) * (want - jax.nn.log_softmax(own, -1))).sum(-1).mean()

    return jnp.stack([of(own.logits, other.logits) for own, other in zip(student, teacher, strict=True)]).mean()


def tune_loss(
    spec: ModelSpec, weights: tuple[dict, TrainBank], teacher: tuple[dict, TrainBank], tokens: Int[Array, "B T1"], config: PregateConfig
) -> tuple[Float[Array, ""], dict]:
    """Next-token loss, the routers' own losses, and with `config.distill` their distance from the original model's.

    Args:
        spec: of the model that is tuned.
        weights, teacher: tuned and original ones.
        tokens: sequences of T + 1 tokens.
        config: how the losses are weighed.

    Returns:
        The sum, and metrics in nats: `nll`, `balance`, `distance` (zero where it has no weight).
    """
    batch, rows = sequences(tokens[:, :-1]), tokens.shape[0]
    logits, _, _, aux = forward(spec, *weights, FullState(rows), batch, KERNELS, collect=True)
    nll = token_nll(logits, tokens[:, 1:].reshape(-1)).mean()
    even, apart = balance_loss(aux["routed"], spec.moe[0].experts), jnp.float32(0.0)
    if config.distill:
        _, _, _, given = forward(pregated(spec, False), *jax.lax.stop_gradient(teacher), FullState(rows), batch, KERNELS, collect=True)
        apart = distance(aux["routed"], given["routed"])
    total = nll + config.balance * even + config.z * z_loss(aux["routed"]) + config.distill * apart
    return total, {"nll": nll, "balance": even, "distance": apart}


def init_tuning(params: dict, bank: TrainBank, config: PregateConfig) -> TuneState:
    """The state to begin with."""
    weights = (params, dataclasses.replace(bank, capacity=config.capacity))

    def is_tuned(path) -> bool:
        return config.weights == "all" or any(getattr(key, "key", None) == "router" for key in path)

    tuned = jax.tree.map_with_path(lambda path, leaf: leaf if is_tuned(path) else None, weights)
    fixed = jax.tree.map_with_path(lambda path, leaf: None if is_tuned(path) else leaf, weights)
    return TuneState(tuned, fixed, loop.optimizer(config.training).init(tuned))


def joined(state: TuneState) -> tuple[dict, TrainBank]:
    """All weights of a state."""
    return jax.tree.map(lambda own, other: other if own is None else own, state.tuned, state.fixed, is_leaf=lambda leaf: leaf is None)


def make_step(spec: ModelSpec, config: PregateConfig) -> Callable:
    """The jitted `(state, teacher, tokens [B, T + 1]) -> (state, metrics)`; the state is donated, `teacher` None without distillation."""
    tx = loop.optimizer(config.training)

    def step(state: TuneState, teacher, tokens):
        def objective(tuned):
            return tune_loss(spec, joined(dataclasses.replace(state, tuned=tuned)), teacher, tokens, config)

        (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.tuned)
        updates, opt = tx.update(grads, state.opt, state.tuned)
        return TuneState(optax.apply_updates(state.tuned, updates), state.fixed, opt), metrics

    return jax.jit(step, donate_argnums=0)


def tune(
    spec: ModelSpec, params: dict, bank: TrainBank, corpus: Corpus, config: PregateConfig, minutes: float | None = None
) -> Iterator[tuple[TuneState, dict]]:
    """Tunes a trained model; yields the state and the metrics (floats, with `step` and `seconds`) after every step.

    The state that is yielded is donated to the next step: read from it (`joined`) before going on.

    Args:
        spec: as it is to become, `pregated(spec)`, or as it was, for a control.
        params, bank: the trained weights (`of_resident`); they are copied, and with `config.distill` stay as the teacher.
        corpus: from `load_corpus`.
        config: settings.
        minutes: stop after this long, wherever the rate is.
    """
    teacher = (params, dataclasses.replace(bank, capacity=config.capacity)) if config.distill else None
    state, step = init_tuning(jax.tree.map(jnp.array, params), jax.tree.map(jnp.array, bank), config), make_step(spec, config)
    shares, began = domain_weights(corpus), time.monotonic()
    for i in range(config.steps):
        at = time.monotonic()
        tokens = sample_batch(corpus, config.seed, i, config.batch, config.length, shares)
        state, metrics = step(state, teacher, jnp.asarray(tokens))
        yield state, {name: float(value) for name, value in metrics.items()} | {"step": i + 1, "seconds": time.monotonic() - at}
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            break


def export(spec: ModelSpec, weights: tuple[dict, TrainBank], source: Path, out: Path) -> int:
    """Writes tuned weights as a Hugging Face folder whose config.json says that its routers choose a layer ahead; returns its bytes.

    Args:
        spec: as tuned.
        weights: of `joined`.
        source: the Hugging Face folder that they came from; its tokenizer and settings are copied.
        out: folder to write.
    """
    config = json.loads((source / "config.json").read_text()) | {PREGATED: True}
    params, experts = loop.to_layered(spec, *weights)
    size = export_hf(spec, flatten({"params": params, "experts": experts}), config, out, config.get("dtype", "bfloat16"))
    for file in source.glob("*.json"):
        if not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
    return size


def nats(spec: ModelSpec, weights: tuple[dict, TrainBank], corpus: Corpus, length: int = 256, most: int = 16) -> dict[str, float]:
    """Held-out nats per token of every domain, and their mean as "mean".

    Args:
        spec, weights: of the model.
        corpus: from `load_corpus`.
        length: tokens of a window.
        most: windows of a domain, at most.
    """
    params, bank = weights
    score = make_scorer(spec, params, ResidentBank(bank.w_in, bank.w_out, bank.activation))
    found = {domain: entry["nats_per_token"] for domain, entry in held_out(score, corpus, length, most=most)[0].items()}
    return {**found, "mean": float(np.mean(list(found.values())))}
