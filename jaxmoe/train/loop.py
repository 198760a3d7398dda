"""The training loop: Muon on matrices, AdamW on the rest, a trapezoid of learning rates, checkpoints that resume.

The schedule is warm-up, constant, linear decay to zero over the last `decay` steps, so that a run can be lengthened: resume the constant part with
more steps, and decay when it is time to stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from optax.contrib import MuonDimensionNumbers, muon

from jaxmoe.nn.transformer import init_params
from jaxmoe.spec import ModelSpec, unstack_layers
from jaxmoe.train.bank import TrainBank
from jaxmoe.train.corpus import Corpus, domain_weights, sample_batch
from jaxmoe.train.loss import loss


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. `length` and `batch` are tokens in a sequence and sequences in a step; `balance` and `z` weigh the router's losses."""

    steps: int = 2000
    decay: int = 400
    warmup: int = 40
    batch: int = 16
    length: int = 256
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    balance: float = 0.01
    z: float = 0.001
    capacity: float = 1.5
    seed: int = 0


@flax.struct.dataclass
class TrainState:
    """Attributes: `params` the segmented tree, `bank` the experts, `opt` the optimizer's state, `step` int32 []."""

    params: dict
    bank: TrainBank
    opt: optax.OptState
    step: jax.Array


def schedule(config: TrainConfig, peak: float) -> Callable:
    """The learning rate of a step: warm-up, constant, linear decay to zero at `config.steps`."""

    def rate(step):
        up = jnp.minimum(1.0, (step + 1) / config.warmup)
        down = jnp.clip((config.steps - step) / max(config.decay, 1), 0.0, 1.0)
        return peak * up * down

    return rate


def _dimensions(tree):
    """Which axes of each leaf a matrix maps from and to; None for leaves that AdamW takes."""

    def of(path, leaf):
        names = [str(getattr(p, "key", getattr(p, "name", ""))) for p in path]
        if names[-1] == "w_in":
            return MuonDimensionNumbers(2, 4)
        if names[-1] == "w_out":
            return MuonDimensionNumbers(2, 3)
        if names[-1] == "kernel" and names[-2] in ("q", "k", "v"):
            return MuonDimensionNumbers(1, (2, 3))
        if names[-1] == "kernel" and names[-2] == "o":
            return MuonDimensionNumbers((1, 2), 3)
        return None

    return jax.tree.map_with_path(of, tree)


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Muon for attention and experts, AdamW for embeddings, routers and norms; gradients clipped to norm 1."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(config, config.muon_lr),
            ns_steps=4,
            weight_decay=config.weight_decay,
            weight_decay_mask=lambda tree: jax.tree.map(lambda x: x.ndim >= 2, tree),
            adam_learning_rate=schedule(config, config.adam_lr),
            adam_b2=0.95,
            muon_weight_dimension_numbers=_dimensions,
        ),
    )


def init_state(spec: ModelSpec, config: TrainConfig) -> TrainState:
    """A fresh state from `config.seed`."""
    key = jax.random.key(config.seed, impl="threefry2x32")
    k_params, k_in, k_out = jax.random.split(key, 3)
    params = init_params(spec, k_params)
    router, experts = spec.moe
    n, e, d, f = len(spec.moe_layers), router.experts, spec.width, experts.width
    bank = TrainBank(
        jax.random.normal(k_in, (n, e, d, 2, f)) * d**-0.5 * 0.5,
        jax.random.normal(k_out, (n, e, f, d)) * f**-0.5 * (2 * spec.n_layers) ** -0.5,
        config.capacity,
    )
    return TrainState(params, bank, optimizer(config).init((params, bank)), jnp.int32(0))


def make_step(spec: ModelSpec, config: TrainConfig) -> Callable:
    """The jitted `(state, tokens [B, T + 1]) -> (state, metrics)`; the state is donated."""
    tx = optimizer(config)

    def step(state: TrainState, tokens):
        def objective(weights):
            return loss(spec, weights[0], weights[1], tokens, config.balance, config.z)

        weights = (state.params, dataclasses.replace(state.bank, capacity=config.capacity))
        (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(weights)
        updates, opt = tx.update(grads, state.opt, weights)
        params, bank = optax.apply_updates(weights, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(params, dataclasses.replace(bank, capacity=state.bank.capacity), opt, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


class Checkpoints:
    """The last states of a run in a folder; saved while the next steps run."""

    def __init__(self, folder: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def save(self, state: TrainState) -> None:
        """Saves leaves by their order, which no change of a module's name disturbs."""
        leaves = {str(i): x for i, x in enumerate(jax.tree.leaves(state))}
        self._manager.save(int(state.step), args=ocp.args.StandardSave(leaves))

    def restore(self, like: TrainState) -> TrainState | None:
        """The last saved state, or None when there is none.

        Raises:
            ValueError: the saved state has other shapes.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        leaves, tree = jax.tree.flatten(like)
        abstract = {str(i): jax.ShapeDtypeStruct(x.shape, x.dtype) for i, x in enumerate(leaves)}
        saved = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return jax.tree.unflatten(tree, [jnp.asarray(saved[str(i)]) for i in range(len(leaves))])

    def close(self) -> None:
        """Waits for what is being saved."""
        self._manager.wait_until_finished()
        self._manager.close()


def train(
    spec: ModelSpec, corpus: Corpus, config: TrainConfig, folder: Path, save_every: int = 100, minutes: float | None = None
) -> Iterator[tuple[TrainState, dict]]:
    """Runs or resumes a run; yields the state and the metrics (floats, with `seconds` of the step) after every step.

    The state that is yielded is donated to the next step: read from it before going on.

    Args:
        spec: the model; float32.
        corpus: from `load_corpus`.
        config: settings.
        folder: where checkpoints and `metrics.jsonl` go.
        save_every: steps between checkpoints.
        minutes: stop (and save) after this long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder / "state")
    state = init_state(spec, config)
    state = checkpoints.restore(state) or state
    step = make_step(spec, config)
    weights = domain_weights(corpus)
    began = time.monotonic()
    with (folder / "metrics.jsonl").open("a") as log, contextlib.closing(checkpoints):
        for i in range(int(state.step), config.steps):
            at = time.monotonic()
            tokens = sample_batch(corpus, config.seed, i, config.batch, config.length, weights)
            state, metrics = step(state, jnp.asarray(tokens))
            row = {k: float(v) for k, v in metrics.items()} | {"step": i + 1, "seconds": time.monotonic() - at}
            log.write(json.dumps(row) + "\n")
            log.flush()
            over = minutes is not None and time.monotonic() - began > 60 * minutes
            if (i + 1) % save_every == 0 or i + 1 == config.steps or over:
                checkpoints.save(state)
            yield state, row
            if over:
                break


def to_layered(spec: ModelSpec, params: dict, bank: TrainBank) -> tuple[dict, dict]:
    """Trained weights as checkpoints hold them: the layered tree, and `{layer: {gate, up, down}}`, as numpy."""
    host = jax.device_get((params, bank))
    experts = {
        str(layer): {
            "gate": np.ascontiguousarray(host[1].w_in[n, :, :, 0]),
            "up": np.ascontiguousarray(host[1].w_in[n, :, :, 1]),
            "down": host[1].w_out[n],
        }
        for n, layer in enumerate(spec.moe_layers)
    }
    return unstack_layers(spec, host[0]), experts
