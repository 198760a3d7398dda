"""Models, splits and comparisons for restoring anywhere; run as a program, one of several processes that restore a folder together.

    python restore_process.py FOLDER EXPECTED.npz COORDINATOR PROCESSES PROCESS OUT.json

It restores onto the devices of all processes, compares what it holds with the arrays in EXPECTED, runs the model, and writes what it found.
"""

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from checkpoints.convert import convert
from checkpoints.families import flatten, leaf_paths, unflatten
from checkpoints.load import Checkpoint, open_checkpoint
from jaxmoe.cache.batch import make_batch
from jaxmoe.cache.layers import init_layers
from jaxmoe.engine import steps
from jaxmoe.experts import ResidentBank
from jaxmoe.nn.transformer import forward
from jaxmoe.spec import stack_layers
from pallas_kernels.dispatch import Kernels
from scripts import make_goldens
from sharding.rules import Rules

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, dict] = {
    "mixtral": {**_SMALL, "model_type": "mixtral", "num_local_experts": 8, "sliding_window": None},
    "qwen3_moe": {
        **_SMALL,
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "intermediate_size": 24,
        "head_dim": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "tie_word_embeddings": True,
    },
    "deepseek_v3": {
        **_SMALL,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "attention_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
}
"""Grouped queries; norms of queries and keys, a dense layer and a tied output matrix; latent attention and shared experts."""

WIDE = {**CONFIGS["mixtral"], "vocab_size": 4096}
"""With matrices that are large enough to be cut along the vocabulary."""

TENSOR = {"hidden": "t", "shared_hidden": "t", "heads": "t", "kv_heads": "t", "vocab": "t"}

SPLITS: dict[str, tuple[dict[str, int], dict]] = {
    "2 experts": ({"e": 2}, {"experts": "e"}),
    "2 tensor": ({"t": 2}, TENSOR),
    "4 data, tensor": ({"d": 2, "t": 2}, TENSOR),
    "4 experts, tensor": ({"e": 2, "t": 2}, {"experts": "e", **TENSOR}),
    "8 experts": ({"e": 8}, {"experts": "e"}),
    "8 experts, data, tensor": ({"e": 2, "d": 2, "t": 2}, {"experts": "e", **TENSOR}),
    "8 width": ({"x": 8}, {"embed": "x"}),
    "8 layers, heads": ({"l": 2, "t": 4}, {"layers": "l", "kv_heads": "t", "heads": "t", "head_dim": "l"}),
}
"""Devices by mesh axis, and the mesh axis of logical ones."""

IDS = [list(range(3, 20)), list(range(40, 51))]


def write(folder: Path, config: dict, dtype: str | None = None, quantizer=None) -> Checkpoint:
    """A model with the random weights of `make_goldens`, converted."""
    make_goldens.write_folder(folder / "hf", config)
    convert(folder / "hf", folder / "out", dtype, quantizer=quantizer)
    return open_checkpoint(folder / "out")


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """The first devices, in order."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return Mesh(np.array(devices).reshape(list(sizes.values())), tuple(sizes))


def placed(split: str):
    """(mesh, where a leaf goes) of one of `SPLITS`."""
    sizes, table = SPLITS[split]
    mesh = make_mesh(sizes)
    return mesh, functools.partial(Rules(table, uneven="replicate").sharding, mesh)


def restore(checkpoint, place, dtype: str | None = None) -> dict:
    """Everything, by dotted path."""
    tree = {
        "params": checkpoint.restore_params(sharding=place, dtype=dtype),
        "experts": checkpoint.restore_experts(sharding=place, dtype=dtype),
        "bank": checkpoint.restore_bank(sharding=place, dtype=dtype),
    }
    return flatten(tree)


def check_shards(got: Mapping[str, jax.Array], expected: Mapping[str, np.ndarray]) -> int:
    """Compares the bits of every slice that a device of this process holds; gives how many there were."""
    assert got.keys() == expected.keys()
    seen = 0
    for path, array in got.items():
        assert array.shape == expected[path].shape and array.dtype == expected[path].dtype, path
        for shard in array.addressable_shards:
            a, b = np.ascontiguousarray(shard.data), np.ascontiguousarray(expected[path][shard.index])
            assert a.shape == b.shape and a.tobytes() == b.tobytes(), (path, shard.index)
            seen += 1
    return seen


def logits(spec, leaves: Mapping[str, jax.Array], mesh: Mesh | None = None) -> np.ndarray:
    """float32 [T, V] of `IDS` in one ragged batch, by arrays of `restore`; everything else lies on all devices of the mesh."""
    whole = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())
    run, kernels = steps.run_length(32), Kernels("reference")

    def put(x):
        return jax.make_array_from_callback(np.shape(x), whole, lambda index: np.asarray(x)[index])

    tokens = sum(-(-len(ids) // run) * run for ids in IDS)
    state = jax.tree.map(put, init_layers(spec, len(IDS), 64, run))
    batch = make_batch([(i, 0, ids) for i, ids in enumerate(IDS)], run, tokens, list(range(tokens)))
    batch = jax.tree.map(lambda x: put(x) if isinstance(x, np.ndarray) else x, batch)

    def score(params, w_in, w_out, state, batch):
        bank = ResidentBank(w_in, w_out, spec.moe[1].activation)
        return forward(spec, stack_layers(spec, params, tuple), bank, state, batch, kernels)[0]

    params = unflatten({path.removeprefix("params."): leaf for path, leaf in leaves.items() if path.startswith("params.")})
    step = jax.jit(score, out_shardings=whole, compiler_options={**kernels.compiler_options(), "xla_backend_optimization_level": 0})
    out = np.asarray(step(params, leaves["bank.w_in"], leaves["bank.w_out"], state, batch))
    return out[np.asarray(batch.segments) >= 0]


def driver_bytes() -> int:
    """What tensorstore's file driver has read in this process."""
    (found,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return found["values"][0]["value"]


def process_bytes() -> int:
    """What this process has read by system calls, and from anything."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def counted(folder: Path, place) -> tuple[dict, dict]:
    """(arrays, bytes read as counted here, by the file driver, by the system, and bytes owned) of a restore of params and experts."""
    checkpoint = open_checkpoint(folder)
    for path in checkpoint.manifest.leaves:
        checkpoint.leaves.reader.array(path)  # what arrays say about themselves isn't counted
    driver, system = driver_bytes(), process_bytes()
    params = checkpoint.restore_params(sharding=place)
    experts = checkpoint.restore_experts(sharding=place)
    jax.block_until_ready((params, experts))
    counts = {
        "driver": driver_bytes() - driver,
        "system": process_bytes() - system,
        "read": checkpoint.bytes_read,
        "owned": checkpoint.bytes_owned,
        "held": held_bytes((params, experts)),
        "ratio": checkpoint.read_ratio(),
    }
    return flatten({"params": params, "experts": experts}), counts


def held_bytes(tree) -> int:
    """Bytes of the different slices that this process's devices hold."""
    return sum(sum({str(shard.index): shard.data.nbytes for shard in array.addressable_shards}.values()) for array in jax.tree.leaves(tree))


def stock_both_ways(folder: Path, place, saved: Path) -> dict[str, jax.Array]:
    """Our folder as stock Orbax restores it in these processes together, which then save it their own way."""
    leaves = leaf_paths(open_checkpoint(folder).spec)
    target = unflatten({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)) for path, leaf in leaves.items()})
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder, target)
        checkpointer.save(saved, tree)
    return flatten(tree)


def main(folder: Path, expected: Path, coordinator: str, processes: int, process: int, out: Path) -> None:
    """What the module's docstring says."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, processes, process)
    assert len(jax.devices()) == processes * len(jax.local_devices()) == 8
    mesh = make_mesh({"p": processes, "t": 8 // processes})
    tables = {
        "aligned": {"experts": "p", "hidden": "t", "vocab": ("p", "t")},
        "hidden over processes": {"experts": "t", "hidden": "p", "vocab": "p"},
        "not aligned": {"embed": "p", "head_dim": "t"},
    }
    counted(folder, SingleDeviceSharding(jax.local_devices()[0]))  # so that nothing is imported while bytes are counted
    found: dict = {"counts": {}, "shards": 0, "logits": {}, "leaves": len(open_checkpoint(folder).manifest.leaves)}
    with np.load(expected) as arrays:
        whole = dict(arrays)
    for name, table in tables.items():
        place = functools.partial(Rules(table).sharding, mesh)
        leaves, found["counts"][name] = counted(folder, place)
        leaves |= {f"bank.{key}": array for key, array in open_checkpoint(folder).restore_bank(sharding=place).items()}
        found["shards"] += check_shards(leaves, {path: array for path, array in whole.items() if path != "logits"})
        if name != "hidden over processes":
            difference = np.abs(logits(open_checkpoint(folder).spec, leaves, mesh) - whole["logits"])
            found["logits"][name] = float(difference.max())
        if name == "aligned":
            stock = stock_both_ways(folder, place, out.parent / "stock")
            found["stock_shards"] = check_shards(stock, {path: whole[path] for path in stock})
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[6]))
