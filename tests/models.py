"""Small models for tests, and logits of theirs by any cut of the prompts into steps."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.cache.batch import make_batch
from jaxmoe.cache.layers import init_layers
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import steps
from jaxmoe.engine.host_driven import HostDriven
from jaxmoe.engine.model import Model, Offload, slot_bank
from jaxmoe.experts import ResidentBank, host_store
from jaxmoe.experts.source import ExpertSource
from jaxmoe.formats import store_numpy
from jaxmoe.residency import Knowledge
from jaxmoe.spec import ModelSpec, abstract_experts, abstract_params, stack_layers
from pallas_kernels.dispatch import Kernels

CPU = Kernels("cpu")

Schedule = list[list[tuple[int, int, int]]]
"""Batches of pieces `(request, start, stop)`; request i lies in cache row i."""

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
}

CONFIGS = {
    "qwen3_moe": {
        **SMALL,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "num_experts": 8,
        "moe_intermediate_size": 32,
        "head_dim": 32,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "olmoe": {**SMALL, "model_type": "olmoe", "num_experts": 8, "norm_topk_prob": False, "clip_qkv": 1.0},
    "mixtral": {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "sliding_window": 40},
}
"""A small config of each family, by its name."""


def random_model(family: str, dtype: str = "float32", kernels: Kernels = CPU, unroll: bool = True, seed: int = 0) -> Model:
    """A model whose activations stay near one and whose router has preferences."""
    spec = ModelSpec.from_hf(CONFIGS[family]).with_precision(dtype)
    rng = np.random.default_rng(seed)

    def leaf(path, abstract):
        name, shape = path[-1].key, abstract.shape
        value = rng.standard_normal(shape, dtype=np.float32)
        if name == "scale":
            value = 1 + 0.2 * value
        elif name == "table":
            value = 0.5 * value
        else:
            inputs = int(np.prod(shape[:2])) if path[-2].key == "o" else shape[-2] if path[0].key in ("gate", "up", "down") else shape[0]
            value = (2.0 if path[-2].key == "router" else 1.0) * value / np.sqrt(inputs)
        return jnp.asarray(store_numpy(value, dtype))

    layered = jax.tree.map_with_path(leaf, abstract_params(spec))
    experts = [
        {name: leaf((jax.tree_util.DictKey(name),) * 2, abstract) for name, abstract in layer.items()}
        for layer in abstract_experts(spec).values()
    ]
    w_in = jnp.stack([jnp.stack([layer["gate"], layer["up"]], axis=2) for layer in experts])
    bank = ResidentBank(w_in, jnp.stack([layer["down"] for layer in experts]))
    return Model(spec, stack_layers(spec, layered, tuple if unroll else jnp.stack), bank, kernels)


def records_of(model: Model) -> np.ndarray:
    """The store of a model whose experts are all on the device."""
    w_in, w_out = np.asarray(model.bank.w_in), np.asarray(model.bank.w_out)
    return host_store.read_records(model.spec, lambda l, e: {"gate": w_in[l, e, :, 0], "up": w_in[l, e, :, 1], "down": w_out[l, e]})


def slot_model(
    model: Model, slots: int | tuple[int, ...], staging: int = 2, policy: str = "lfu", fill: str | None = None, knowledge: Knowledge | None = None
) -> Model:
    """The model with its experts in host memory, a random profile if nothing else is told, and NaN in staging slots that have been used."""
    knowledge = knowledge or Knowledge(jnp.asarray(np.random.default_rng(5).random(model.bank.w_in.shape[:2]), jnp.float32))
    bank = slot_bank(model.spec, records_of(model), Offload(slots, staging, policy, knowledge, fill))
    return dataclasses.replace(model, bank=dataclasses.replace(bank, poison=True))


def host_driven_step(model: Model):
    """`steps.logits_step` of a slot-bank model, with the host sending the experts."""
    bank = dataclasses.replace(model.bank, store=None)
    runner = HostDriven(model.spec, bank, model.kernels, True, ExpertSource(model.spec, np.asarray(model.bank.store)))

    def step(params, _, state, batch):
        rows = batch.logit_rows.shape[0]
        _, logits, state, _ = runner.step(params, state, batch, sampling_params(rows), np.zeros(rows, np.int32))
        return logits, state

    return step


def prefill_logits(
    model: Model, requests: list[list[int]], schedule: Schedule, tokens: int, rows: int | None = None, positions: int = 512
) -> list[np.ndarray]:
    """float32 logits [len(ids), V] of each request, prefilled by a schedule in steps of `tokens`."""
    run = steps.run_length(tokens)
    layers = init_layers(model.spec, rows or len(requests), positions, steps.run_length(steps.TOKEN_BUCKETS[-1]))
    state = steps.committed(steps.EngineState(layers, model.bank.init_state()))
    step = steps.logits_step(model.spec, model.kernels)
    out = [np.full((len(ids), model.spec.vocab), np.nan, np.float32) for ids in requests]
    for pieces in schedule:
        batch = make_batch([(i, start, requests[i][start:stop]) for i, start, stop in pieces], run, tokens, list(range(tokens)))
        logits, state = step(model.params, model.bank, state, batch)
        for token, (i, position) in enumerate(zip(batch.segments, batch.positions, strict=True)):
            if i >= 0:
                out[i][position] = logits[token]
    return out


def decode_logits(
    model: Model, requests: list[list[int]], bucket: int, rows: int | None = None, positions: int = 512, step: Callable | None = None
) -> list[np.ndarray]:
    """The same, every request fed one token at a time from its first on, all requests together in steps of `bucket` rows."""
    layers = init_layers(model.spec, rows or len(requests), positions, steps.run_length(steps.TOKEN_BUCKETS[-1]))
    state = steps.committed(steps.EngineState(layers, model.bank.init_state()))
    step = step or steps.logits_step(model.spec, model.kernels)
    out = [np.full((len(ids), model.spec.vocab), np.nan, np.float32) for ids in requests]
    for position in range(max(map(len, requests))):
        going = [i for i, ids in enumerate(requests) if position < len(ids)]
        rest = bucket - len(going)
        batch = steps.decode_batch(
            steps.pad_to(going, bucket),
            np.asarray([requests[i][position] for i in going] + [0] * rest, np.int32),
            np.asarray([position] * len(going) + [0] * rest, np.int32),
            np.arange(bucket) < len(going),
        )
        logits, state = step(model.params, model.bank, state, batch)
        for i, row in zip(going, np.asarray(logits), strict=False):
            out[i][position] = row
    return out
