"""Opens converted folders and builds arrays from them: whole trees, one expert, or all experts as a resident bank.

Only the slices that are asked for are read, straight into the dtype that is asked for. bfloat16 is held as uint16
throughout.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from checkpoints import store
from checkpoints.convert import PROGRESS, convert
from checkpoints.errors import CheckpointError
from checkpoints.families import held_in, leaf_dtype_name, leaf_paths, unflatten
from checkpoints.manifest import MANIFEST, SPEC, Manifest, read_manifest
from checkpoints.plan import make_plan, read_config
from checkpoints.quantized import open_source
from jaxmoe import formats
from jaxmoe.formats import ExpertLayout
from jaxmoe.spec import Leaf, ModelSpec, SpecError

Placement = jax.sharding.Sharding | Callable[[Leaf], jax.sharding.Sharding] | None
"""Where arrays go: one sharding for all, a function of the leaf (its shape and axes), or None for the default
device."""

_READ_BYTES = 32 << 20  # of experts read at once while a bank is filled


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A converted folder that is open. `spec.precision.params` is the dtype on disk."""

    folder: Path
    spec: ModelSpec
    manifest: Manifest
    _arrays: dict[str, ts.TensorStore] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def file(self, name: str) -> Path | None:
        """The path of a kept file such as 'tokenizer.json'; None if the source had none."""
        return self.folder / name if name in self.manifest.files else None

    def read(self, path: str, index: tuple = (), dtype: str | None = None) -> np.ndarray:
        """A slice of a leaf as a numpy array.

        Args:
            path: dotted, e.g. 'experts.0.gate'.
            index: ints and slices, as numpy takes them; () is the whole leaf.
            dtype: 'float32' or 'bfloat16' (uint16 comes back); None for the leaf's own on disk.

        Raises:
            CheckpointError: no such leaf, or one of its chunks is missing or damaged; the message names leaf and file.
        """
        data = store.read_array(self.folder, path, self._array(path), index)
        return formats.store_numpy(data, dtype or self.manifest.leaves[path].dtype)

    def restore_params(
        self, spec: ModelSpec | None = None, sharding: Placement = None, dtype: str | None = None
    ) -> dict:
        """The layered tree of everything but routed experts and extra heads, as `abstract_params` describes it.

        Args:
            spec: what the caller computes with; it must be this checkpoint's model, its precision may differ.
            sharding: see `Placement`; each device's slice is read on its own.
            dtype: 'float32' or 'bfloat16'; None for `spec.precision.params`. Leaves that are float32 in any model stay so.

        Returns:
            Nested dicts of jax arrays; bfloat16 as uint16.

        Raises:
            CheckpointError: another model's spec, an unsupported dtype, or a damaged leaf.
        """
        return self._restore("params.", spec, sharding, dtype, ("extra",))

    def restore_experts(
        self, spec: ModelSpec | None = None, sharding: Placement = None, dtype: str | None = None
    ) -> dict:
        """The routed experts: `{layer: {gate [E, D, F], up [E, D, F], down [E, F, D]}}`; arguments and errors as
        `restore_params`."""
        return self._restore("experts.", spec, sharding, dtype, self._heads())

    def restore_extra_heads(
        self, spec: ModelSpec | None = None, sharding: Placement = None, dtype: str | None = None
    ) -> dict:
        """The heads of multi-token prediction, which are kept for drafting and loaded apart: `{head: {embed_norm, hidden_norm, join, layer, norm,
        experts}}`, the last as `restore_experts` gives them; arguments and errors as `restore_params`."""
        heads = self._restore("params.extra.", spec, sharding, dtype)
        for i, layer in enumerate(self._heads()):
            heads[str(i)]["experts"] = self._restore(f"experts.{layer}.", spec, sharding, dtype)
        return heads

    def _heads(self) -> tuple[str, ...]:
        """The layers that the extra heads' experts are filed under."""
        return tuple(str(self.spec.n_layers + i) for i in range(len(self.spec.extra_heads)))

    def read_expert(self, layer: int, expert: int, dtype: str | None = None, verify: bool = False) -> dict[str, np.ndarray]:
        """One expert as numpy arrays; only its chunks are read.

        Args:
            layer: the model's layer index.
            expert: which of the layer's E.
            dtype: as for `read`.
            verify: compare what was read with the manifest's checksums.

        Returns:
            `{gate [D, F], up [D, F], down [F, D]}`.

        Raises:
            CheckpointError: no such expert, a damaged chunk, or a checksum that fails.
        """
        first = f"experts.{layer}.gate"
        if first not in self.manifest.leaves:
            raise CheckpointError(
                f"{self.folder}: layer {layer} has no experts (layers {list(self.spec.moe_layers)} have)"
            )
        count = self.manifest.leaves[first].shape[0]
        if not 0 <= expert < count:
            raise CheckpointError(f"{self.folder}: layer {layer} has experts 0 to {count - 1}, {expert} was asked for")
        out = {}
        for name in ("gate", "up", "down"):
            path = f"experts.{layer}.{name}"
            data = store.read_array(self.folder, path, self._array(path), (expert,))
            if verify:
                self._check_unit(path, expert, data)
            out[name] = formats.store_numpy(data, dtype or self.manifest.leaves[path].dtype)
        return out

    def restore_bank(
        self, spec: ModelSpec | None = None, dtype: str | None = None, sharding: Placement = None, layout: ExpertLayout = "d2f"
    ) -> dict[str, jax.Array]:
        """All experts as a resident bank holds them: index 0 of w_in's axis of 2 is gate, 1 up.

        Each device's part is filled in place on the host and handed over whole, so that no second copy of it is made
        here. On the CPU, jax takes over the host's memory.

        Args:
            spec, dtype: as `restore_params`.
            sharding: as `restore_params`; the leaves' axes are ('layers', 'experts', 'embed', None, 'hidden') and
                ('layers', 'experts', 'hidden', 'embed'), the last ones in the order of `layout`.
            layout: the order of an expert's axes.

        Returns:
            `{"w_in": [L_moe, E, D, 2, F], "w_out": [L_moe, E, F, D]}`, in that order; bfloat16 as uint16.

        Raises:
            CheckpointError: as `restore_params`.
            SpecError: the model has no experts, or layers whose experts differ in shape.
        """
        spec, dtype = self._checked(spec, dtype)
        router, experts = spec.moe
        n, e, d, f = len(spec.moe_layers), router.experts, spec.width, experts.width
        held = formats.leaf_dtype(dtype)
        shapes, axes = formats.expert_shapes(d, f, layout), formats.expert_axis_names(layout)
        w_in, w_out = (Leaf((n, e, *shape), held, ("layers", "experts", *names)) for shape, names in zip(shapes, axes, strict=True))
        return {
            "w_in": _build(w_in, sharding, lambda index: self._bank_in(w_in, index, dtype, layout)),
            "w_out": _build(w_out, sharding, lambda index: self._bank_out(w_out, index, dtype, layout)),
        }

    def verify(self, progress: store.Progress | None = None) -> None:
        """Reads every chunk and compares it with the manifest's checksums.

        Args:
            progress: called with (bytes read, bytes in all, leaf path).

        Raises:
            CheckpointError: the first leaf that is missing, damaged or altered.
        """
        done = 0
        for path, record in self.manifest.leaves.items():
            experts = path.startswith("experts.")
            for unit, expected in enumerate(record.crc32):
                first = (unit,) if experts else ()
                shape, chunk = record.shape[len(first) :], record.chunk[len(first) :]
                crc = 0
                for axis, start, stop in store.unit_chunks(shape, chunk):
                    index = tuple(slice(start, stop) if i == axis else slice(None) for i in range(len(shape)))
                    data = store.read_array(self.folder, path, self._array(path), (*first, *index))
                    crc = zlib.crc32(np.ascontiguousarray(data).data, crc)
                    done += data.nbytes
                    if progress is not None:
                        progress(done, self.manifest.nbytes, path)
                if f"{crc:08x}" != expected:
                    which = f"leaf {path}, expert {unit}," if experts else f"leaf {path}"
                    raise CheckpointError(
                        f"{self.folder}: {which} has checksum {crc:08x}, the manifest says {expected}"
                    )

    def _check_unit(self, path: str, expert: int, data: np.ndarray) -> None:
        """Compares one expert's matrix [.., ..], in the dtype on disk, with its checksum."""
        record, crc = self.manifest.leaves[path], 0
        for axis, start, stop in store.unit_chunks(data.shape, record.chunk[1:]):
            crc = zlib.crc32(np.ascontiguousarray(data[(slice(None),) * axis + (slice(start, stop),)]).data, crc)
        if f"{crc:08x}" != record.crc32[expert]:
            raise CheckpointError(f"{self.folder}: leaf {path}, expert {expert}, has checksum {crc:08x}, the manifest says {record.crc32[expert]}")

    def _array(self, path: str) -> ts.TensorStore:
        if path not in self.manifest.leaves:
            raise CheckpointError(f"{self.folder}: there is no leaf {path}")
        if path not in self._arrays:
            self._arrays[path] = store.open_array(self.folder, path, self.manifest.leaves[path])
        return self._arrays[path]

    def _checked(self, spec: ModelSpec | None, dtype: str | None) -> tuple[ModelSpec, str]:
        spec = spec or self.spec
        dtype = dtype or spec.precision.params
        if dtype not in formats.DTYPES:
            raise CheckpointError(f"unsupported dtype {dtype!r}: choose one of {', '.join(formats.DTYPES)}")
        if dataclasses.replace(spec, precision=self.spec.precision) != self.spec:
            raise CheckpointError(f"{self.folder}: holds the model {self.spec.hash()}, which is not the one asked for")
        return spec, dtype

    def _restore(self, prefix: str, spec: ModelSpec | None, sharding: Placement, dtype: str | None, left_out: tuple[str, ...] = ()) -> dict:
        """The leaves below `prefix`, but for the branches `left_out`."""
        spec, dtype = self._checked(spec, dtype)
        leaves = {}
        for path, leaf in leaf_paths(held_in(spec, dtype)).items():
            if path.startswith(prefix) and path.removeprefix(prefix).split(".")[0] not in left_out:
                read = functools.partial(self.read, path, dtype=leaf_dtype_name(leaf))
                leaves[path.removeprefix(prefix)] = _build(leaf, sharding, read)
        return unflatten(leaves)

    def _bank_in(self, leaf: Leaf, index: tuple, dtype: str, layout: ExpertLayout) -> np.ndarray:
        out = formats.aligned_empty(_shape_of(leaf.shape, index), leaf.dtype)
        axes = formats.expert_axes(layout)[0]
        embed, pair, hidden = (index[2 + axis] for axis in axes)
        parts = _inner_transposed(out, axes)
        for j, name in enumerate(("gate", "up")[pair]):
            self._fill(parts[:, :, :, j], name, index[0], index[1], (embed, hidden), dtype)
        return out

    def _bank_out(self, leaf: Leaf, index: tuple, dtype: str, layout: ExpertLayout) -> np.ndarray:
        out = formats.aligned_empty(_shape_of(leaf.shape, index), leaf.dtype)
        axes = formats.expert_axes(layout)[1]
        self._fill(_inner_transposed(out, axes), "down", index[0], index[1], tuple(index[2 + axis] for axis in axes), dtype)
        return out

    def _fill(self, out: np.ndarray, name: str, layers: slice, experts: slice, inner: tuple, dtype: str) -> None:
        """Reads leaf `name` of the layers and experts into `out [layers, experts, ...]`, a few experts at a time."""
        for row, layer in zip(out, self.spec.moe_layers[layers], strict=True):
            for some in _blocks(experts, row.shape[0], max(1, _READ_BYTES // max(1, row[0].nbytes))):
                here = slice(some.start - (experts.start or 0), some.stop - (experts.start or 0))
                row[here] = self.read(f"experts.{layer}.{name}", (some, *inner), dtype)


def _blocks(span: slice, count: int, step: int) -> Iterator[slice]:
    first = span.start or 0
    for start in range(first, first + count, step):
        yield slice(start, min(start + step, first + count))


def _inner_transposed(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """A view of [layers, experts, ...] with the axes after the first two in another order."""
    return x.transpose(0, 1, *(2 + axis for axis in axes))


def _shape_of(shape: tuple[int, ...], index: tuple) -> tuple[int, ...]:
    return tuple(len(range(*part.indices(n))) for n, part in zip(shape, index, strict=True))


def _build(leaf: Leaf, sharding: Placement, read: Callable[[tuple], np.ndarray]) -> jax.Array:
    """One jax array; devices that hold the same slice share one read."""
    if sharding is None:
        return jax.device_put(read((slice(None),) * len(leaf.shape)))
    target = sharding if isinstance(sharding, jax.sharding.Sharding) else sharding(leaf)
    slices: dict[str, np.ndarray] = {}

    def once(index: Any) -> np.ndarray:
        key = str(index)
        if key not in slices:
            slices[key] = read(index)
        return slices[key]

    return jax.make_array_from_callback(leaf.shape, target, once)


def open_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Opens a converted folder; reads its manifest and spec, no array.

    Raises:
        CheckpointError: no such folder, an unfinished or damaged one, or one of another version.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if (path / PROGRESS).exists() and path.name.endswith(".partial"):
        raise CheckpointError(f"{path}: an unfinished conversion: run it again, it will go on from there")
    manifest = read_manifest(path)
    try:
        spec = ModelSpec.from_json(json.loads((path / SPEC).read_bytes()))
    except FileNotFoundError:
        raise CheckpointError(f"{path / SPEC}: missing") from None
    except (SpecError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / SPEC}: damaged: {store.one_line(error)}") from error
    if spec.hash() != manifest.spec_hash:
        raise CheckpointError(
            f"{path / SPEC}: damaged: it is spec {spec.hash()}, the manifest is of {manifest.spec_hash}"
        )
    return Checkpoint(path, spec, manifest)


def read_spec(path: str | os.PathLike) -> ModelSpec:
    """The model that a folder of either kind, converted or Hugging Face, says it holds; no weights are read.

    Raises:
        CheckpointError: neither kind of folder, an unfinished or damaged one, or a model that isn't supported.
    """
    return open_checkpoint(path).spec if _is_converted(Path(path)) else read_config(Path(path))


def _is_converted(folder: Path) -> bool:
    """Whether a folder is a converted one, finished or not, rather than a Hugging Face folder."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / MANIFEST).exists() or (folder / PROGRESS).exists():
        return True
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: neither a Hugging Face folder (no config.json) nor a converted one (no {MANIFEST})"
        )
    return False


def load_hf_or_checkpoint(
    path: str | os.PathLike,
    cache_dir: str | os.PathLike,
    dtype: str | None = None,
    progress: store.Progress | None = None,
) -> Checkpoint:
    """Opens a converted folder, or converts a Hugging Face folder once into the cache and opens that.

    Args:
        path: either kind of folder.
        cache_dir: conversions are kept there, each under the source's fingerprint and the spec's hash.
        dtype: what a Hugging Face folder is converted to, as for `convert`; a converted one is opened as it is.
        progress: as for `convert`.

    Raises:
        CheckpointError: neither kind of folder, or whatever `convert` and `open_checkpoint` find.
    """
    folder = Path(path)
    if _is_converted(folder):
        return open_checkpoint(folder)
    with open_source(folder) as source:
        plan = make_plan(folder, source, dtype)
    out = Path(cache_dir) / f"{plan.fingerprint[:16]}-{plan.spec.hash()}"
    convert(folder, out, dtype, progress)
    return open_checkpoint(out)
