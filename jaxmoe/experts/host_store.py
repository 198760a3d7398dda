"""The experts' home in host memory: one contiguous record an expert, read only, never copied back.

A record is what one transfer moves: the elements of an expert's input matrices [D, 2, F], then those of its output matrix [F, D], each with its axes
in the order that the device's kernels want (`jaxmoe.formats.ExpertLayout`). Knows neither checkpoints nor disks: readers come in as callables.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np

from jaxmoe import formats
from jaxmoe.formats import ExpertLayout
from jaxmoe.spec import ModelSpec

COLUMNS = 256
"""Elements of a row of a record, where they divide it: the fill kernels move tiles of such rows."""

ExpertReader = Callable[[int, int], dict[str, np.ndarray]]
"""`(moe_layer, expert) -> {gate [D, F], up [D, F], down [F, D]}` in the dtype of the leaves; raises where what it reads is damaged."""


def entry_shapes(spec: ModelSpec, layout: ExpertLayout = "d2f") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one expert's entries in the pools: [D, 2, F] and [F, D], in the order of `layout`."""
    return formats.expert_shapes(spec.width, spec.moe[1].width, layout)


def record_shape(spec: ModelSpec) -> tuple[int, int]:
    """Rows and columns of a record."""
    size = sum(map(math.prod, entry_shapes(spec)))
    columns = COLUMNS if size % COLUMNS == 0 else size
    return size // columns, columns


def record_bytes(spec: ModelSpec) -> int:
    """Bytes of a record, as it crosses the link."""
    return math.prod(record_shape(spec)) * formats.leaf_dtype(spec.precision.params).itemsize


def pack_record(
    spec: ModelSpec, expert: dict[str, np.ndarray], out: np.ndarray | None = None, layout: ExpertLayout = "d2f"
) -> np.ndarray:
    """One expert's matrices as its record [rows, columns].

    Args:
        spec: the model.
        expert: `{gate, up, down}`.
        out: where to write it.
        layout: the order of axes in it.
    """
    shapes, axes = entry_shapes(spec, layout), formats.expert_axes(layout)
    size = math.prod(shapes[0])
    out = np.empty(record_shape(spec), formats.leaf_dtype(spec.precision.params)) if out is None else out
    flat = out.reshape(-1)
    both = flat[:size].reshape(shapes[0]).transpose(axes[0])
    both[:, 0], both[:, 1] = expert["gate"], expert["up"]
    flat[size:].reshape(shapes[1]).transpose(axes[1])[:] = expert["down"]
    return out


def read_records(
    spec: ModelSpec, read: ExpertReader, progress: Callable[[int, int], None] = lambda done, total: None, layout: ExpertLayout = "d2f"
) -> np.ndarray:
    """All records [L * E, rows, columns] in ordinary host memory.

    Args:
        spec: the model.
        read: gives one expert.
        progress: called with records read and records in all.
        layout: the order of axes in them.
    """
    layers, experts = len(spec.moe_layers), spec.moe[0].experts
    out = formats.aligned_empty((layers * experts, *record_shape(spec)), formats.leaf_dtype(spec.precision.params))
    for i in range(layers * experts):
        pack_record(spec, read(i // experts, i % experts), out[i], layout)
        progress(i + 1, layers * experts)
    return out


def pinned(records: np.ndarray) -> jax.Array:
    """The records as an array in the default device's `pinned_host` memory, which a compiled step can read.

    Raises:
        ValueError: the memory could not be had; the message says what bounds it.
    """
    device = jax.devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    try:
        return jax.block_until_ready(jax.device_put(records, sharding))
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"{records.nbytes / 1e9:.2f} GB of experts do not fit into pinned host memory. On GPUs its pool is limited by "
            f"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB, which has to be set in the environment before jax starts: {str(error).splitlines()[0]}"
        ) from error
