"""What the JSON in safetensors files and their index says, held to the format: names, dtypes, shapes and where each tensor lies.

It parses bytes that others have read, and opens no file (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError

DTYPES: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Dtypes that can be read, and the numpy dtype that holds each: bfloat16 is held as uint16."""

PACKED: dict[str, np.dtype] = {"U8": np.dtype("u1"), "F8_E4M3": np.dtype("u1")}
"""Dtypes of packed numbers, which `read_bytes` reads as they are."""

_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Every dtype of the format, and the bits an element takes: the sizes of tensors that aren't read are checked as well."""

MAX_HEADER = 100_000_000  # bytes, as the reference reader limits it; of the index as well
_MAX_NAME = 1000  # characters
_MAX_AXES = 64  # numpy's limit
_MAX_ELEMENTS = 2**63 - 1  # numpy's limit, which holds for the axes that aren't empty


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `nbytes` are bytes in `file`; `dtype` is as the file spells it ('BF16')."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


def parse_index(path: Path, raw: bytes) -> dict[str, str]:
    """The map from tensor to file.

    Raises:
        CheckpointError: no JSON object with one, a name that occurs twice or isn't one, or a file that isn't text.
    """
    where = f"{path}: damaged"
    data = _parse_json(where, raw)
    index = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(index, dict):
        raise CheckpointError(f"{where}: no JSON object with a 'weight_map' of names to files")
    if isinstance(index, _Ambiguous):
        raise CheckpointError(f"{where}: tensor {shown(index.twice)} is listed twice")
    if isinstance(data, _Ambiguous):
        raise CheckpointError(f"{where}: {shown(data.twice)} is there twice")
    for name, file in index.items():
        _check_name(where, name)
        if not isinstance(file, str):
            raise CheckpointError(f"{where}: the file of tensor {name} is {shown(file)}, which is no name: 'weight_map' maps names to files")
    return index


class _Ambiguous(dict):
    """A JSON object in which a key was given more than once; `twice` is the first such key."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        seen: set[str] = set()
        self.twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which `json` would otherwise build of the last value that each key was given."""
    plain = dict(pairs)
    return plain if len(plain) == len(pairs) else _Ambiguous(pairs)


def _parse_json(where: str, raw: bytes | bytearray) -> Any:
    """What JSON in UTF-8 says, objects with keys twice as `_Ambiguous`; neither NaN nor Infinity are in it.

    Raises:
        CheckpointError: it is something else; the message begins with `where`.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number in JSON")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=refuse)
    except UnicodeDecodeError as error:
        why = f"no UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        why = f"{error.msg} at character {error.pos}"
    except RecursionError:
        why = "nested too deeply"
    except ValueError as error:  # a constant, or a number of thousands of digits
        why = str(error).split(";")[0]
    raise CheckpointError(f"{where}: not JSON: {why}")


def _check_name(where: str, name: str) -> None:
    if len(name) > _MAX_NAME or not name.isprintable():
        raise CheckpointError(f"{where}: {shown(name)} is not a tensor's name")


def shown(value: Any) -> str:
    """A value as an error shows it: in one line, and not much of it."""
    text = repr(value) if not isinstance(value, (dict, list)) else f"a {'list' if isinstance(value, list) else 'dict'}"
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def parse_header(path: Path, raw: bytearray) -> list[TensorInfo]:
    """Tensors in the order of their data.

    Raises:
        CheckpointError: no JSON object, a tensor twice, a field missing or malformed, sizes that disagree with shapes,
            or data with holes or overlaps.
    """
    where = f"{path}: damaged header"
    header = _parse_json(where, raw)
    if isinstance(header, _Ambiguous):
        raise CheckpointError(f"{where}: tensor {shown(header.twice)} is listed twice")
    _check_metadata(where, header.pop("__metadata__", None))
    infos = [_parse_tensor(path, 8 + len(raw), name, entry) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.nbytes))
    at = 8 + len(raw)
    for info in infos:
        if info.start != at:
            raise CheckpointError(f"{where}: tensor {info.name} begins at byte {info.start}, the one before ends at {at}")
        at += info.nbytes
    return infos


def _check_metadata(where: str, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ doesn't map names to texts")
    if isinstance(metadata, _Ambiguous):
        raise CheckpointError(f"{where}: __metadata__ lists {shown(metadata.twice)} twice")


def _parse_tensor(path: Path, data: int, name: str, entry: Any) -> TensorInfo:
    where = f"{path}: damaged header"
    _check_name(where, name)
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: tensor {name} lacks dtype, shape or data_offsets")
    if isinstance(entry, _Ambiguous):
        raise CheckpointError(f"{where}: tensor {name} has {shown(entry.twice)} twice")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where}: tensor {name} has dtype {shown(dtype)}, which the format doesn't have")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{where}: shape or offsets of tensor {name} are not counts")
    if len(shape) > _MAX_AXES or math.prod(n for n in shape if n) > _MAX_ELEMENTS:
        raise CheckpointError(f"{where}: tensor {name} has an impossible shape: {len(shape)} axes, {shown(str(shape[:8]))}")
    (start, stop), bits = offsets, _BITS[dtype] * math.prod(shape)
    if 8 * (stop - start) != bits:
        taken = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits"
        raise CheckpointError(f"{where}: tensor {name} of {dtype} {shape} takes {taken}, its offsets span {stop - start}")
    return TensorInfo(name, dtype, tuple(shape), path.name, data + start, stop - start)


def _are_counts(values: Any) -> bool:
    """Whether it's a list of integers of 64 bits, none negative."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**64 for n in values)
