"""Training of the learned predictors (`jaxmoe.offload.predictors.path` and `readme`) on recorded traces, and their files.

Whole sequences are read at once, every position a sample: attention there is over the same window, and recent routing over the same tokens, as when
the predictor runs. This file knows traces, not models or texts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxmoe.offload.predictors.interface import Sizes, common_sizes, sequences, sizes_of
from jaxmoe.offload.predictors.network import Fitted, NetSettings, frequencies
from jaxmoe.offload.predictors.path import PathNet
from jaxmoe.offload.predictors.readme import ReadMeNet
from jaxmoe.offload.trace import Trace, model_hash
from jaxmoe.spec import ModelSpec

FORMAT = "jaxmoe-predictor"
VERSION = 1
NETS: dict[str, Callable[[NetSettings], nn.Module]] = {"path": PathNet, "readme": ReadMeNet}
NET_DEFAULTS: dict[str, dict[str, Any]] = {"path": {}, "readme": {"width": 64, "pairs": 0, "decays": ()}}


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How a network is trained.

    Attributes:
        steps: of the optimizer.
        batch: sequences, or pieces of them, in a step.
        length: tokens of a piece.
        rate: the peak of the learning rate, which falls to zero by a cosine.
        warmup: steps in which it rises.
        weight_decay: of AdamW.
        blank: share of tokens that are hidden, so that it learns from what is around them too.
        next_weight: of the next step's loss beside this step's.
    """

    steps: int = 900
    batch: int = 16
    length: int = 128
    rate: float = 4e-3
    warmup: int = 50
    weight_decay: float = 0.05
    blank: float = 0.05
    next_weight: float = 0.5

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: give at least 1")


def pieces(traces: Sequence[Trace], length: int) -> dict[str, np.ndarray]:
    """The traces' sequences, cut and filled up to `length` with tokens that are not there.

    Returns:
        `tokens` int32 [P, length], -1 beyond the end; `ids` int16 [P, length, L, A] and `weights` float16 of the same shape.

    Raises:
        ValueError: no traces, traces of different models, or a token is not known.
    """
    common_sizes(traces)
    if any((trace.tokens < 0).any() for trace in traces):
        raise ValueError("the trace holds no token ids, and this predictor reads tokens: record one (imported route traces have none)")
    parts: dict[str, list[np.ndarray]] = {"tokens": [], "ids": [], "weights": []}
    for trace in traces:
        for places in sequences(trace):
            for at in range(0, len(places), length):
                own = places[at : at + length]
                for name, fill in (("tokens", -1), ("ids", -1), ("weights", 0)):
                    found = getattr(trace, name)[own]
                    rest = np.full((length - len(own), *found.shape[1:]), fill, found.dtype)
                    parts[name].append(np.concatenate([found, rest]))
    return {name: np.stack(part) for name, part in parts.items()}


def dense_targets(ids: Int[Array, "*N A"], weights: Float[Array, "*N A"], experts: int) -> tuple[Array, Array]:
    """Which experts were used, float32 [..., E] of zeros and ones, and their share of the token's weight."""
    chosen = ids[..., None] == jnp.arange(experts)
    used = chosen.any(-2).astype(jnp.float32)
    share = (chosen * weights[..., None].astype(jnp.float32)).sum(-2)
    return used, share / jnp.maximum(share.sum(-1, keepdims=True), 1e-9)


def _losses(kind: str, logits: jax.Array, used: jax.Array, share: jax.Array) -> jax.Array:
    """[B, T], summed over layers: binary cross-entropy of every expert's use, or cross-entropy to the router's shares."""
    if kind == "path":
        return optax.sigmoid_binary_cross_entropy(logits, used).sum((-1, -2))
    return -(share * jax.nn.log_softmax(logits, -1)).sum((-1, -2))


def make_loss(kind: str, net: NetSettings, fit: FitSettings) -> Callable:
    """The pure `(leaves, batch, key) -> nats per token` of this step, with the next step's beside it."""
    module: Any = NETS[kind](net)

    def loss(leaves, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
        tokens, there = batch["tokens"], batch["tokens"] >= 0
        used, share = dense_targets(batch["ids"], batch["weights"], net.sizes.experts)
        recent = [frequencies(used, decay) for decay in net.decays]
        recent_BTNLE = jnp.stack(recent, 2) if recent else jnp.zeros((*used.shape[:2], 0, *used.shape[2:]))
        shown = jnp.where(jax.random.bernoulli(key, fit.blank, tokens.shape), -1, tokens)
        logits = module.apply({"params": leaves}, shown, recent_BTNLE)
        now = _losses(kind, logits[:, :, 0], used, share)
        then = _losses(kind, logits[:, :-1, 1], used[:, 1:], share[:, 1:])
        return (now * there).sum() / there.sum() + fit.next_weight * (then * there[:, 1:]).sum() / jnp.maximum(there[:, 1:].sum(), 1)

    return loss


def optimizer(fit: FitSettings) -> optax.GradientTransformation:
    """AdamW on matrices and tables, gradients clipped to norm 1, the rate rising and then falling to zero by a cosine."""
    rate = optax.warmup_cosine_decay_schedule(0.0, fit.rate, min(fit.warmup, fit.steps // 2), max(fit.steps, 1))
    decayed = functools.partial(jax.tree.map, lambda leaf: leaf.ndim >= 2)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=fit.weight_decay, mask=decayed))


@functools.cache
def make_step(kind: str, net: NetSettings, fit: FitSettings) -> Callable:
    """The jitted `(leaves, optimizer's state, batch, key) -> (leaves, state, loss)`; the first two are donated."""
    tx, value_and_grad = optimizer(fit), jax.value_and_grad(make_loss(kind, net, fit))

    def step(leaves, state, batch: Mapping[str, jax.Array], key: jax.Array):
        loss, grads = value_and_grad(leaves, batch, key)
        updates, state = tx.update(grads, state, leaves)
        return optax.apply_updates(leaves, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def init_leaves(kind: str, net: NetSettings, key: jax.Array) -> Any:
    """Random parameters of a network."""
    return make_init(kind, net)(key, *_sample(net))["params"]


def _sample(net: NetSettings) -> tuple[jax.Array, jax.Array]:
    """Inputs of a network, for their shapes."""
    return jnp.zeros((1, net.window), jnp.int32), jnp.zeros((1, 1, len(net.decays), net.sizes.layers, net.sizes.experts))


@functools.cache
def make_init(kind: str, net: NetSettings) -> Callable:
    """The jitted `init` of a network."""
    return jax.jit(NETS[kind](net).init)


def train(
    traces: Sequence[Trace],
    kind: str,
    settings: FitSettings | None = None,
    seed: int = 0,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    **net: Any,
) -> Fitted:
    """Trains a predictor; the same arguments give the same parameters on the same machine.

    Args:
        traces: of one model, of any phase, with tokens.
        kind: 'path' or 'readme'.
        settings: how.
        seed: of parameters, order and hidden tokens.
        progress: called with `(step, steps, loss in nats per token)` every 50 steps.
        net: fields of `NetSettings` that differ from their defaults.

    Raises:
        ValueError: no such kind, no traces, traces of different models, or a trace without tokens.
    """
    if kind not in NETS:
        raise ValueError(f"there is no learned predictor {kind!r}: choose one of {', '.join(NETS)}")
    fit = settings or FitSettings()
    shape = NetSettings(common_sizes(traces), **(NET_DEFAULTS[kind] | net))
    data = pieces(traces, fit.length)
    key = jax.random.key(seed, impl="threefry2x32")
    leaves, step = init_leaves(kind, shape, key), make_step(kind, shape, fit)
    state = optimizer(fit).init(leaves)
    for i, places in enumerate(piece_order(len(data["tokens"]), fit, seed)):
        batch = {name: part[places] for name, part in data.items()}
        leaves, state, loss = step(leaves, state, batch, jax.random.fold_in(key, i))
        if (i + 1) % 50 == 0 or i + 1 == fit.steps:
            progress(i + 1, fit.steps, float(loss))
    return Fitted(kind, shape, leaves)


def piece_order(count: int, fit: FitSettings, seed: int) -> np.ndarray:
    """Which pieces each step takes, [steps, batch]: every piece once before any comes again."""
    rng, need = np.random.default_rng(seed), fit.steps * fit.batch
    rounds = [rng.permutation(count) for _ in range(-(-need // count))]
    return np.concatenate(rounds)[:need].reshape(fit.steps, fit.batch)


def save(path: str | Path, params: Fitted, meta: Mapping[str, Any]) -> None:
    """Writes a trained predictor, whole or not at all.

    Args:
        path: an .npz.
        params: from `train`.
        meta: of the traces that it was trained on (`Trace.meta`): model and spec_hash are kept, and what else is JSON.

    Raises:
        OSError: the file can't be written.
    """
    path = Path(path)
    about = {"format": FORMAT, "version": VERSION, "kind": params.kind, "settings": dataclasses.asdict(params.settings), "meta": dict(meta)}
    arrays = {name: np.asarray(leaf) for name, leaf in flax.traverse_util.flatten_dict(params.leaves, sep="/").items()}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def load(path: str | Path, of: ModelSpec | Mapping[str, Any], kind: str | None = None) -> Fitted:
    """Reads what `save` wrote.

    Args:
        path: the file.
        of: the model that is to be predicted, or the meta data of a trace of it.
        kind: 'path' or 'readme', if it has to be that.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no predictor, a damaged one, of another version or kind, or of another model; the message begins with the path.
    """
    raw = Path(path).read_bytes()
    try:
        if not raw.startswith(b"PK"):
            raise ValueError("not a predictor file")
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes()) if "about" in file else {}
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise ValueError("not a predictor file")
            if about.get("version") != VERSION:
                raise ValueError(f"a predictor of version {about.get('version')}; this program reads version {VERSION}")
            if kind not in (None, about["kind"]) or about["kind"] not in NETS:
                raise ValueError(f"a predictor of kind {about['kind']!r}; {kind or ' or '.join(NETS)} is needed")
            settings = _settings(about["settings"])
            _check_model(about["meta"], settings.sizes, of)
            return Fitted(about["kind"], settings, _leaves(about["kind"], settings, file))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, NotImplementedError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _settings(found: dict[str, Any]) -> NetSettings:
    return NetSettings(**(found | {"sizes": Sizes(**found["sizes"]), "decays": tuple(found["decays"])}))


def _check_model(meta: Mapping[str, Any], sizes: Sizes, of: ModelSpec | Mapping[str, Any]) -> None:
    """Refuses a predictor of another model; models that name no spec are compared by their sizes."""
    if isinstance(of, ModelSpec):
        mine, known = sizes_of(of), model_hash(of)
    else:
        mine, known = Sizes(of["layers"], of["experts"], of["active"]), of["spec_hash"]
    theirs = meta.get("spec_hash")
    if mine != sizes or None not in (known, theirs) and known != theirs:
        raise ValueError(f"a predictor of {meta.get('model')} ({sizes}, spec {theirs}), but the model has {mine}, spec {known}: train one for it")


def _leaves(kind: str, settings: NetSettings, file: Mapping[str, np.ndarray]) -> Any:
    """The parameters, each of the shape that the settings ask for."""
    wanted: Any = jax.eval_shape(NETS[kind](settings).init, jax.random.key(0), *_sample(settings))
    flat = flax.traverse_util.flatten_dict(wanted["params"], sep="/")
    for name, leaf in flat.items():
        if file[name].shape != leaf.shape or file[name].dtype != leaf.dtype or not np.isfinite(file[name]).all():
            raise ValueError(f"{name} is {file[name].dtype}{list(file[name].shape)}; needed: {leaf.dtype}{list(leaf.shape)}, all of it finite")
    return flax.traverse_util.unflatten_dict({name: jnp.asarray(file[name]) for name in flat}, sep="/")
