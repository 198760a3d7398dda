"""Trees, banks and single experts out of a folder of arrays, whatever format that folder has.

What a leaf's bits are never depends on how it is split: each slice is read on its own, in the dtype that is asked for; quantized experts are
multiplied out as they are read, unless they are asked for as they are. bfloat16 is held as uint16 throughout.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from checkpoints.arrays import Fill, Placement, build, build_all
from checkpoints.bank import Gather, bank_leaves, fill_w_in, fill_w_out, in_order
from checkpoints.errors import CheckpointError
from checkpoints.families import held_in, leaf_dtype_name, leaf_paths, unflatten
from checkpoints.leaves import Leaves, supported
from checkpoints.quantizer import SCALES, VALUES
from jaxmoe.formats import ExpertLayout, Quantized
from jaxmoe.spec import Leaf, ModelSpec

EXPERT_LEAVES = ("gate", "up", "down")


class WeightTree:
    """A model's weights in a folder that is open.

    Attributes:
        folder: where they are.
        spec: the model; `spec.precision.params` is the dtype on disk.
        leaves: the arrays by dotted path.
    """

    folder: Path
    spec: ModelSpec
    leaves: Leaves

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """`{"method", "bits", "group"}` where the routed experts are quantized; else None."""
        return None

    @property
    def bytes_read(self) -> int:
        """Bytes of chunks that were read from disk since the folder was opened, by this process."""
        return self.leaves.reader.bytes_read

    @property
    def bytes_owned(self) -> int:
        """Bytes on disk of what was asked for: of a restored array, of the slices that this process's devices hold, each counted once."""
        return self.leaves.reader.bytes_owned

    def read_ratio(self) -> float:
        """Bytes read per byte owned: 1 where every split falls between chunks; 1 as well before anything was asked for."""
        return self.bytes_read / self.bytes_owned if self.bytes_owned else 1.0

    def read(self, path: str, index: tuple = (), dtype: str | None = None) -> np.ndarray:
        """A slice of a leaf as a numpy array.

        Args:
            path: dotted, e.g. 'experts.0.gate'; of a quantized leaf, that of the weights, or that of its values or scales.
            index: ints and slices, as numpy takes them; () is the whole leaf.
            dtype: 'float32' or 'bfloat16' (uint16 comes back); None for the leaf's own on disk, and for quantized weights the model's.

        Raises:
            CheckpointError: no such leaf, or one of its chunks is missing or damaged; the message names leaf and file.
            IndexError: an index that is out of range.
        """
        return self.leaves.read(path, index, dtype)

    def restore_params(
        self, spec: ModelSpec | None = None, sharding: Placement = None, dtype: str | None = None
    ) -> dict:
        """The layered tree of everything but routed experts and extra heads, as `abstract_params` describes it.

        Args:
            spec: what the caller computes with; it must be this checkpoint's model, its precision may differ.
            sharding: see `Placement`; each slice that this process's devices hold is read once.
            dtype: 'float32' or 'bfloat16'; None for `spec.precision.params`. Leaves that are float32 in any model stay so.

        Returns:
            Nested dicts of jax arrays; bfloat16 as uint16.

        Raises:
            CheckpointError: another model's spec, an unsupported dtype, or a damaged leaf.
        """
        return self._restore("params.", spec, sharding, dtype, ("extra",))

    def restore_experts(
        self, spec: ModelSpec | None = None, sharding: Placement = None, dtype: str | None = None, quantized: bool = False
    ) -> dict:
        """The routed experts: `{layer: {gate [E, D, F], up [E, D, F], down [E, F, D]}}`; arguments and errors as
        `restore_params`.

        Args:
            quantized: give `jaxmoe.formats.Quantized` leaves as they are on disk. `sharding` is asked for values and scales then, and no dtype is
                taken.

        Raises:
            CheckpointError: also `quantized` of a folder that isn't, or with a dtype.
        """
        if not quantized:
            return self._restore("experts.", spec, sharding, dtype, self._heads())
        self._check_quantized(dtype)
        self._checked(spec, None)
        return {
            str(layer): {name: self._restore_quantized(f"experts.{layer}.{name}", sharding) for name in EXPERT_LEAVES}
            for layer in self.spec.moe_layers
        }

    def restore_extra_heads(
        self, spec: ModelSpec | None = None, sharding: Placement = None, dtype: str | None = None
    ) -> dict:
        """The heads of multi-token prediction, which are kept for drafting and loaded apart: `{head: {embed_norm, hidden_norm, join, layer, norm,
        experts}}`, the last as `restore_experts` gives them; arguments and errors as `restore_params`."""
        heads = self._restore("params.extra.", spec, sharding, dtype)
        for i, layer in enumerate(self._heads()):
            heads[str(i)]["experts"] = self._restore(f"experts.{layer}.", spec, sharding, dtype)
        return heads

    def read_expert(
        self, layer: int, expert: int, dtype: str | None = None, verify: bool = False, quantized: bool = False
    ) -> dict[str, Any]:
        """One expert as numpy arrays; only its chunks are read.

        Args:
            layer: the model's layer index.
            expert: which of the layer's E.
            dtype: as for `read`.
            verify: compare what was read with the folder's checksums, where it has some.
            quantized: give the expert as it is on disk; no dtype is taken.

        Returns:
            `{gate [D, F], up [D, F], down [F, D]}`, or of `jaxmoe.formats.Quantized`.

        Raises:
            CheckpointError: no such expert, a damaged chunk, a checksum that fails, or `quantized` as for `restore_experts`.
        """
        self._check_expert(layer, expert)
        if quantized:
            self._check_quantized(dtype)
        return {name: self.leaves.read_matrix(f"experts.{layer}.{name}", expert, dtype, verify, quantized) for name in EXPERT_LEAVES}

    def restore_bank(
        self, spec: ModelSpec | None = None, dtype: str | None = None, sharding: Placement = None, layout: ExpertLayout = "d2f",
        order: Int[np.ndarray, "L P"] | None = None,
    ) -> dict[str, jax.Array]:
        """All experts as a resident bank holds them: index 0 of w_in's axis of 2 is gate, 1 up.

        Each device's part is filled in place on the host and handed over whole, so that no second copy of it is made
        here. On the CPU, jax takes over the host's memory.

        Args:
            spec, dtype: as `restore_params`.
            sharding: as `restore_params`; the leaves' axes are ('layers', 'experts', 'embed', None, 'hidden') and
                ('layers', 'experts', 'hidden', 'embed'), the last ones in the order of `layout`.
            layout: the order of an expert's axes.
            order: which expert stands at each position of each layer that has experts, some perhaps at several; None for the model's order.

        Returns:
            `{"w_in": [L_moe, E, D, 2, F], "w_out": [L_moe, E, F, D]}`, in that order, E the positions; bfloat16 as uint16.

        Raises:
            CheckpointError: as `restore_params`.
            SpecError: the model has no experts, or layers whose experts differ in shape.
        """
        spec, dtype = self._checked(spec, dtype)
        layers = spec.moe_layers
        gather: Gather = functools.partial(self.leaves.gather, dtype=dtype)
        gather = gather if order is None else in_order(gather, layers, order)
        w_in, w_out = bank_leaves(spec, dtype, layout, None if order is None else order.shape[1])
        return {
            "w_in": build(w_in, sharding, lambda targets: fill_w_in(targets, layers, layout, gather)),
            "w_out": build(w_out, sharding, lambda targets: fill_w_out(targets, layers, layout, gather)),
        }

    def _checked(self, spec: ModelSpec | None, dtype: str | None) -> tuple[ModelSpec, str]:
        spec = spec or self.spec
        dtype = supported(dtype or spec.precision.params)
        if dataclasses.replace(spec, precision=self.spec.precision) != self.spec:
            raise CheckpointError(f"{self.folder}: holds the model {self.spec.hash()}, which is not the one asked for")
        return spec, dtype

    def _check_expert(self, layer: int, expert: int) -> None:
        try:
            count = self.leaves.describe(f"experts.{layer}.gate")[0][0]
        except CheckpointError:
            raise CheckpointError(
                f"{self.folder}: layer {layer} has no experts (layers {list(self.spec.moe_layers)} have)"
            ) from None
        if not 0 <= expert < count:
            raise CheckpointError(f"{self.folder}: layer {layer} has experts 0 to {count - 1}, {expert} was asked for")

    def _check_quantized(self, dtype: str | None) -> None:
        if self.quantization is None:
            raise CheckpointError(f"{self.folder}: its experts are not quantized, and can't be given as quantized ones")
        if dtype is not None:
            raise CheckpointError(f"{self.folder}: quantized experts are given as they are on disk, not as {dtype}")

    def _heads(self) -> tuple[str, ...]:
        """The layers that the extra heads' experts are filed under."""
        return tuple(str(self.spec.n_layers + i) for i in range(len(self.spec.extra_heads)))

    def _restore(self, prefix: str, spec: ModelSpec | None, sharding: Placement, dtype: str | None, left_out: tuple[str, ...] = ()) -> dict:
        """The leaves below `prefix`, but for the branches `left_out`."""
        spec, dtype = self._checked(spec, dtype)
        leaves = {path.removeprefix(prefix): leaf for path, leaf in leaf_paths(held_in(spec, dtype)).items() if path.startswith(prefix)}
        leaves = {path: leaf for path, leaf in leaves.items() if path.split(".")[0] not in left_out}
        todo = ((leaf, functools.partial(self.leaves.gather, prefix + path, dtype=leaf_dtype_name(leaf))) for path, leaf in leaves.items())
        return unflatten(dict(zip(leaves, build_all(todo, sharding), strict=True)))

    def _restore_quantized(self, path: str, sharding: Placement) -> Quantized:
        def part(name: str) -> tuple[Leaf, Fill]:
            record = self.leaves.records[f"{path}.{name}"]
            leaf = Leaf(record.shape, np.dtype(np.float32 if name == SCALES else np.int8), record.axes)
            return leaf, functools.partial(self.leaves.gather_raw, f"{path}.{name}")

        values, scales = build_all([part(VALUES), part(SCALES)], sharding)
        return self.leaves.as_quantized(values, scales)
