"""Leaves of an open folder as weights of a dtype, plain or quantized on disk: slices of them into buffers, and what was asked for, counted.

Quantized leaves are multiplied out a few experts at a time. This file knows neither trees nor devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from checkpoints.dequantize import Packing
from checkpoints.errors import CheckpointError
from checkpoints.quantizer import SCALES, VALUES
from checkpoints.reading import Box, Reader, Target, box_of, volume, within
from jaxmoe import formats
from jaxmoe.formats import Quantized

WIDEN_BYTES = 32 << 20
"""Of experts as float32 that quantized ones are multiplied out to at once."""


class Record(Protocol):
    """One array on disk: `dtype` is what its numbers are, 'float32', 'bfloat16', 'float16', 'int8' or 'int4'."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def axes(self) -> tuple[str | None, ...]: ...


class Leaves:
    """Leaves by dotted path; of quantized ones, both the weights (`experts.0.gate`) and their arrays (`experts.0.gate.values`)."""

    def __init__(
        self, folder: Path, records: Mapping[str, Record], reader: Reader, dtype: str, quantization: Mapping[str, Any] | None = None,
        check: Callable[[str, int, np.ndarray], None] = lambda path, expert, data: None,
    ):  # fmt: skip
        """
        Args:
            folder: for errors.
            records: every array there is.
            reader: reads them and counts.
            dtype: what quantized weights stand for.
            quantization: `{"bits", "group"}` where experts are quantized.
            check: compares one expert's part of an array, as it is on disk, with its checksum; raises CheckpointError.
        """
        self.folder, self.records, self.reader = folder, records, reader
        self._dtype, self._quantization, self._check = dtype, quantization, check

    def describe(self, path: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a leaf's numbers; of quantized weights, as what they are multiplied out to.

        Raises:
            CheckpointError: there is no such leaf.
        """
        packing = self._packing(path)
        if packing is not None:
            shape = self.records[f"{path}.{VALUES}"].shape
            return (*shape[:-2], packing.k, shape[-1]), self._dtype
        if path not in self.records:
            raise CheckpointError(f"{self.folder}: there is no leaf {path}")
        return self.records[path].shape, self.records[path].dtype

    def read(self, path: str, index: tuple, dtype: str | None) -> np.ndarray:
        """See `WeightTree.read`."""
        shape, own = self.describe(path)
        box, rest = box_of(index, shape)
        if own in ("int8", "int4"):
            if dtype is not None:
                raise CheckpointError(f"{self.folder}: leaf {path} holds {own} numbers of quantized weights, which mean nothing as {dtype}")
            return self._read_raw(path, box)[rest]
        dtype = supported(dtype or ("float32" if own == "float16" else own))
        if self._packing(path) is None:
            return formats.store_numpy(self._read_raw(path, box), dtype)[rest]
        out = np.empty(tuple(b - a for a, b in box), formats.leaf_dtype(dtype))
        self.gather(path, [Target(box, out)], dtype)
        return out[rest]

    def read_matrix(self, path: str, expert: int, dtype: str | None, verify: bool, quantized: bool) -> Any:
        """One expert's part of a leaf; arguments as for `WeightTree.read_expert`."""
        packing = self._packing(path)
        parts = []
        for name in [path] if packing is None else [f"{path}.{VALUES}", f"{path}.{SCALES}"]:
            inner = self.records[name].shape[1:]
            parts.append(self._read_raw(name, ((expert, expert + 1), *((0, n) for n in inner)))[0])
            if verify:
                self._check(name, expert, parts[-1])
        if quantized:
            return self.as_quantized(*parts)
        own = self.describe(path)[1]
        data = parts[0] if packing is None else packing.dequantize(*parts)
        return formats.store_numpy(data, supported(dtype or ("float32" if own == "float16" else own)))

    def as_quantized(self, values: Any, scales: Any) -> Quantized:
        """Values and scales of this folder, as one."""
        assert self._quantization is not None
        return Quantized(values, scales, self._quantization["bits"], self._quantization["group"], -2)

    def gather_raw(self, path: str, targets: list[Target], convert: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> None:
        """Fills slices of an array, as it is on disk if `convert` doesn't change it; no two of them overlap.

        Raises:
            CheckpointError: a chunk is missing or damaged.
        """
        self.reader.gather(path, targets, convert)
        self.reader.own(sum(volume(target.box) for target in targets) * self.reader.array(path).dtype.numpy_dtype.itemsize)

    def gather(self, path: str, targets: list[Target], dtype: str) -> None:
        """Fills slices of a leaf with weights of `dtype`; no two of them overlap.

        Raises:
            CheckpointError: no such leaf, or a chunk that is missing or damaged.
        """
        self.describe(path)
        packing = self._packing(path)
        if packing is None:
            self.gather_raw(path, targets, lambda x: formats.store_numpy(x, dtype))
            return
        for some in _few_experts(targets, packing):
            self._gather_dequantized(path, packing, some, dtype)
        self.reader.own(packing.nbytes([target.box for target in targets]))

    def _gather_dequantized(self, path: str, packing: Packing, targets: list[Target], dtype: str) -> None:
        wide = [packing.widened(target.box) for target in targets]
        values = [_buffer(packing.values_box(box), np.int8) for box in wide]
        scales = [_buffer(packing.scales_box(box), np.float32) for box in wide]
        self.reader.gather(f"{path}.{VALUES}", values)
        self.reader.gather(f"{path}.{SCALES}", scales)
        for target, box, numbers, steps in zip(targets, wide, values, scales, strict=True):
            weights = packing.dequantize(numbers.out, steps.out)
            target.out[...] = formats.store_numpy(weights[within(target.box, box)], dtype)

    def _packing(self, path: str) -> Packing | None:
        """How a leaf is quantized, if it is."""
        values = self.records.get(f"{path}.{VALUES}")
        if values is None or self._quantization is None:
            return None
        bits = self._quantization["bits"]
        return Packing(bits, self._quantization["group"], values.shape[-2] * 8 // bits)

    def _read_raw(self, path: str, box: Box) -> np.ndarray:
        data = self.reader.read(path, box)
        self.reader.own(data.nbytes)
        return data


def supported(dtype: str) -> str:
    """The dtype; raises CheckpointError for one in which weights can't be held."""
    if dtype not in formats.DTYPES:
        raise CheckpointError(f"unsupported dtype {dtype!r}: choose one of {', '.join(formats.DTYPES)}")
    return dtype


def _buffer(box: Box, dtype: Any) -> Target:
    return Target(box, np.empty(tuple(b - a for a, b in box), dtype))


def _few_experts(targets: list[Target], packing: Packing) -> Iterator[list[Target]]:
    """The targets cut along experts, so that what is multiplied out at once stays small."""
    first, last = (edge([target.box[0][i] for target in targets]) for i, edge in enumerate((min, max)))
    each = 4 * sum(volume(packing.widened(target.box)[1:]) for target in targets)
    step = max(1, WIDEN_BYTES // max(1, each))
    for start in range(first, last, step):
        some = []
        for target in targets:
            a, b = max(start, target.box[0][0]), min(start + step, target.box[0][1])
            if a < b:
                some.append(Target(((a, b), *target.box[1:]), target.out[a - target.box[0][0] : b - target.box[0][0]]))
        yield some
