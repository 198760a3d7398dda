"""What is inside a folder of weights of any kind, finished or not: its leaves, and what it says about itself. No numbers are read.

It knows files' headers and descriptions; how they are shown is not its affair.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import commit, store, trees
from checkpoints.errors import CheckpointError
from checkpoints.families import choose_layout, hf_tensors, leaf_paths
from checkpoints.journal import PROGRESS
from checkpoints.kinds import LeafInfo, kind_of
from checkpoints.load import open_checkpoint
from checkpoints.manifest import MANIFEST, SPEC, LeafRecord, read_manifest
from checkpoints.plan import examine
from checkpoints.quantized import open_source
from checkpoints.quantizer import SCALES
from checkpoints.safetensors_reader import INDEX, SINGLE, SafetensorsFolder
from checkpoints.safetensors_writer import MARKER
from jaxmoe.spec import ModelSpec
from jaxmoe.spec.params import parameter_counts


@dataclasses.dataclass(frozen=True)
class Contents:
    """A folder.

    Attributes:
        folder: which.
        what: 'converted folder', 'Hugging Face folder', 'saved tree', 'Orbax save', or what is unfinished.
        model: what its config says, if there is one.
        about: what else it says of itself, by name.
        leaves: its arrays.
        files: of arrays.
        kept: small files beside them.
        notes: sentences on what is missing or odd.
        done: bytes that are there of an unfinished folder, and those that there will be (0 if nobody said).
    """

    folder: str
    what: str
    model: dict[str, Any] | None
    about: dict[str, Any]
    leaves: tuple[LeafInfo, ...]
    files: int
    kept: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    done: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.nbytes for leaf in self.leaves)


def describe(folder: Path) -> Contents:
    """What a folder is and holds.

    Raises:
        CheckpointError: none of the kinds of folders, or a damaged one.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / PROGRESS).is_file() and (folder.name.endswith(".partial") or not (folder / MANIFEST).exists()):
        return _unfinished_conversion(folder)
    if (folder / MANIFEST).exists() or (folder / SPEC).exists():
        return _converted(folder)  # which says what is missing
    if (folder / MARKER).is_file():
        return _unfinished_export(folder)
    if (folder / trees.TREE).exists():
        return _tree(folder)
    for name, what in ((trees.BEGUN, "unfinished saved tree"), (commit.LOCK, "unfinished folder")):
        if (folder / name).is_file():
            return _unfinished(folder, what)
    if (folder / SINGLE).exists() or (folder / INDEX).exists() or (folder / "config.json").exists():
        return _hugging_face(folder)
    return _orbax(folder)


def about_model(spec: ModelSpec) -> dict[str, Any]:
    """What there is to say of a model."""
    total, active = parameter_counts(spec)
    routers = [layer.router for layer in spec.layers if layer.router is not None]
    return {
        "family": spec.family,
        "layers": spec.n_layers,
        "moe_layers": len(spec.moe_layers),
        "experts": sorted({router.experts for router in routers}),
        "active_experts": sorted({router.active for router in routers}),
        "width": spec.width,
        "vocab": spec.vocab,
        "extra_heads": len(spec.extra_heads),
        "parameters": total,
        "active_parameters": active,
        "spec_hash": spec.hash(),
    }


# --- kinds of folders -------------------------------------------------------------------------------------------------


def _converted(folder: Path) -> Contents:
    source = open_checkpoint(folder)
    manifest, n_layers = source.manifest, source.spec.n_layers
    leaves = tuple(_of_record(path, record, n_layers) for path, record in manifest.leaves.items())
    about = {
        "format": f"version {manifest.version}, {manifest.layout}",
        "dtype": manifest.dtype,
        "quantization": manifest.quantization,
        "source": {"names": manifest.names, "files": len(manifest.source_files), "nbytes": sum(file[1] for file in manifest.source_files)},
        "source_dtypes": sorted({kind for record in manifest.leaves.values() for kind in record.source_dtypes}),
        "revision": manifest.revision,
        "fingerprint": manifest.fingerprint,
    }
    notes = []
    if manifest.ignored:
        notes.append(f"{len(manifest.ignored)} tensors of the source were passed over ({manifest.dropped[0]} weights, {manifest.dropped[1]} bytes)")
    if manifest.absent_heads:
        notes.append(f"the config has {manifest.absent_heads} extra head(s) whose tensors the source lacked")
    files = sum(leaf.files for leaf in leaves)
    return Contents(str(folder), "converted folder", about_model(source.spec), about, leaves, files, tuple(manifest.files), tuple(notes))


def _of_record(path: str, record: LeafRecord, n_layers: int) -> LeafInfo:
    return _leaf(path, record.shape, record.dtype, record.nbytes, record.chunk, n_layers)


def _leaf(path: str, shape: tuple[int, ...], dtype: str, nbytes: int, chunk: tuple[int, ...], n_layers: int | None = None) -> LeafInfo:
    per_number = 0 if path.endswith(f".{SCALES}") and path.startswith("experts.") else 2 if dtype == "int4" else 1
    files = math.prod(-(-n // max(1, c)) for n, c in zip(shape, chunk, strict=True))
    return LeafInfo(path, kind_of(path, n_layers), shape, dtype, per_number * math.prod(shape), nbytes, chunk, files)


def _unfinished_conversion(folder: Path) -> Contents:
    lines = (folder / PROGRESS).read_bytes().decode("utf-8", "replace").splitlines()
    entries = [entry for entry in map(_json, lines) if isinstance(entry, dict)]
    header = next((entry for entry in entries if "fingerprint" in entry), {})
    leaves = tuple(_arrays_on_disk(folder))
    sizes = {leaf.path: leaf for leaf in leaves}
    done = 0
    for entry in entries:
        name, expert = str(entry.get("leaf")), entry.get("expert")
        for path in (name, f"{name}.values", f"{name}.scales"):
            if path in sizes:
                done += sizes[path].nbytes // (1 if expert is None else max(1, *sizes[path].shape[:1], 1))
    about = {key: header[key] for key in ("version", "layout", "dtype", "quantization", "spec_hash", "fingerprint") if key in header}
    about["units"] = sum(1 for entry in entries if "leaf" in entry)
    total = read_manifest(folder).nbytes if (folder / MANIFEST).exists() else header.get("nbytes", 0)
    notes = ("run the conversion again, it will go on from there",)
    return Contents(str(folder), "unfinished conversion", None, about, leaves, sum(leaf.files for leaf in leaves), (), notes, (done, total))


def _unfinished(folder: Path, what: str) -> Contents:
    leaves = tuple(_arrays_on_disk(folder))
    return Contents(str(folder), what, None, {}, leaves, sum(leaf.files for leaf in leaves), (), ("files of these leaves may be missing",))


def _arrays_on_disk(folder: Path) -> Iterator[LeafInfo]:
    for path in sorted(folder.glob("*/zarr.json")):
        data = _json(path.read_text(encoding="utf-8", errors="replace"))
        try:
            shape, chunk = tuple(data["shape"]), tuple(data["chunk_grid"]["configuration"]["chunk_shape"])
            dtype = str(data["data_type"])
            yield _leaf(path.parent.name, shape, "bfloat16" if dtype == "uint16" else dtype, np.dtype(dtype).itemsize * math.prod(shape), chunk)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged: {store.one_line(error)}") from error


def _unfinished_export(folder: Path) -> Contents:
    wanted = _json((folder / MARKER).read_text(encoding="utf-8", errors="replace"))
    files = sorted(folder.glob("*.safetensors"))
    done = sum(path.stat().st_size for path in files)
    total = wanted.get("nbytes", 0) if isinstance(wanted, dict) else 0
    total = total if isinstance(total, int) else 0
    notes = ("run the export again, it begins anew",)
    return Contents(str(folder), "unfinished export", None, {}, (), len(files), (), notes, (done, total))


def _tree(folder: Path) -> Contents:
    info = trees.read_tree(folder)
    leaves = tuple(
        _leaf(path, leaf.shape, leaf.dtype, leaf.nbytes, leaf.chunk)
        for path, leaf in info.leaves.items()
    )
    about = {"format": f"version {trees.VERSION}", "step": info.step, "metadata": info.metadata}
    return Contents(str(folder), "saved tree", None, about, leaves, sum(leaf.files for leaf in leaves))



def _hugging_face(folder: Path) -> Contents:
    with open_source(folder) as source:
        kept = tuple(sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".jinja") and path.name != INDEX))
        about: dict[str, Any] = {"dtypes": _counts(source.source), "quantization": source.form or None}
        try:
            found = examine(folder, source)
        except CheckpointError as error:
            leaves = tuple(
                LeafInfo(name, name.split(".")[0], info.shape, info.dtype, info.size, info.nbytes) for name, info in source.source.tensors.items()
            )
            return Contents(str(folder), "Hugging Face folder", None, about, leaves, len(source.files), kept, (str(error),))
        leaves = tuple(_of_tensors(found.spec, source))
        about["names"] = found.layout.name
        notes = [*found.wrong]
        if found.left:
            notes.append(f"{len(found.left)} tensors fill no leaf: {', '.join(found.left[:5])}{', ...' if len(found.left) > 5 else ''}")
        return Contents(str(folder), "Hugging Face folder", about_model(found.spec), about, leaves, len(source.files), kept, tuple(notes))


def _counts(source: SafetensorsFolder) -> dict[str, int]:
    out: dict[str, int] = {}
    for info in source.tensors.values():
        out[info.dtype] = out.get(info.dtype, 0) + 1
    return out


def _of_tensors(spec: ModelSpec, source: Any) -> Iterator[LeafInfo]:
    """The leaves that a folder's tensors would fill, with their bytes there."""
    layout = choose_layout(spec, source.tensors, source.form)
    nbytes: dict[str, int] = {}
    kinds: dict[str, set[str]] = {}
    for name, (shape, parts) in hf_tensors(spec, layout).items():
        if name not in source.tensors:
            continue
        info = source[name]
        for path, piece in parts:
            nbytes[path] = nbytes.get(path, 0) + info.nbytes * piece.rows * piece.cols // max(1, math.prod(shape))
            kinds.setdefault(path, set()).add(info.dtype)
    for path, leaf in leaf_paths(spec).items():
        if path in nbytes:
            dtype = "/".join(sorted(kinds[path]))
            yield LeafInfo(path, kind_of(path, spec.n_layers), leaf.shape, dtype, math.prod(leaf.shape), nbytes[path])


def _orbax(folder: Path) -> Contents:
    item = _orbax_item(folder)
    import orbax.checkpoint as ocp  # takes seconds, and nothing else here needs it

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(item.absolute()).item_metadata.tree
    except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{item}: damaged, Orbax can't read what it says of itself: {store.one_line(error)}") from error
    files = sum(1 for path in item.rglob("*") if path.is_file())
    return Contents(str(item), "Orbax save", None, {"ocdbt": (item / "manifest.ocdbt").exists()}, tuple(_of_orbax(tree)), files)


def _orbax_item(folder: Path) -> Path:
    name = store.ORBAX_METADATA
    found = [folder / name] if (folder / name).is_file() else sorted(folder.glob(f"*/{name}")) or sorted(folder.glob(f"*/*/{name}"))
    if not found:
        raise CheckpointError(f"{folder}: neither a converted folder, a Hugging Face folder, a saved tree nor an Orbax save")
    if len(found) > 1:
        raise CheckpointError(f"{folder}: holds several saves: choose one of {', '.join(str(path.parent) for path in found[:20])}")
    return found[0].parent


def _of_orbax(tree: Any, prefix: str = "") -> Iterator[LeafInfo]:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in entries:
        path = f"{prefix}{key}"
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if shape is None or dtype is None:
            yield from _of_orbax(value, f"{path}.")
            continue
        chunk = getattr(getattr(value, "storage", None), "chunk_shape", None)
        nbytes = np.dtype(dtype).itemsize * math.prod(shape)
        yield LeafInfo(path, kind_of(path), tuple(shape), np.dtype(dtype).name, math.prod(shape), nbytes, tuple(chunk) if chunk else None)


def _json(text: str) -> Any:
    """What a line says; None for one that was cut off."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
