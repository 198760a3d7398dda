"""Tensors that are stored packed, seen as the plain ones: decoded rows by rows while they are read.

Two forms, by `quantization_config.quant_method` of config.json:

- *fp8*: `X` in F8_E4M3 beside `X_scale_inv`, by whose numbers its blocks are multiplied (arXiv:2412.19437, section 3.3); the last blocks may be
  partial.
- *mxfp4*: `X_blocks` U8 `[..., groups, 16]` beside `X_scales` U8 `[..., groups]`: 32 numbers E2M1 (the low half of a byte first) times
  2^(scale - 127) (OCP Microscaling Formats, version 1.0). X is `[..., groups * 32]`: as transformers' `convert_moe_packed_tensors` has it before
  it swaps the last two axes.

Numbers are decoded in float32, and rounded once, to the dtype in which the leaf is held. That is what transformers 5 does
(`integrations/finegrained_fp8.py`, `Fp8Dequantize`): it multiplies in float32 and rounds to the parameter's dtype; asked for float32, it doesn't go
through bfloat16, and neither does this. It takes the size of blocks from the number of scales, which with partial last blocks is an error there, or
another size; here the config's size counts, as in DeepSeek's own `weight_dequant`. mxfp4's numbers have two significant bits, so that nothing is
rounded; a scale of 255, which the format keeps for what is not a number, is 2^128 here and there.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from checkpoints.safetensors_header import DTYPES, TensorInfo
from checkpoints.safetensors_reader import SafetensorsFolder, SourceFile

_FP8, _MXFP4 = "F8_E4M3", "U8"
_SCALE = "_scale_inv"
_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = 32

_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)  # [256, 2]: both halves of a byte
with np.errstate(over="ignore"):
    _SCALED = np.ldexp(_PAIRS, np.arange(-127, 129)[:, None, None]).reshape(-1, 2)  # [256 * 256, 2]: by scale and byte


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tensor that is stored as two: `info` is the plain one's (`nbytes` those on disk), `values` and `scales` are the names of the stored ones."""

    info: TensorInfo
    values: str
    scales: str


class Unpacked:
    """A folder of safetensors whose packed tensors appear under the names and with the shapes of the plain ones.

    Args:
        source: the folder.
        given: `quantization_config` of its config.json; None shows every tensor as it is.

    Attributes:
        tensors: of every tensor; a packed one's dtype is the packed form's.
        packed: those that are packed, by name.
        problems: what is wrong with packed tensors, a line for each.
        form: 'fp8' or 'mxfp4' where there are any.
    """

    def __init__(self, source: SafetensorsFolder, given: dict | None = None):
        self.source = source
        self.folder = source.folder
        self.tensors = dict(source.tensors)
        self.packed: dict[str, Packed] = {}
        self.problems: list[str] = []
        self._block = (1, 1)
        method = (given or {}).get("quant_method")
        if method == "fp8":
            self._find_fp8((given or {}).get("weight_block_size"))
        elif method == "mxfp4":
            self._find_mxfp4()
        self.form = str(method) if self.packed else ""

    def __enter__(self) -> Unpacked:
        return self

    def __exit__(self, *_) -> None:
        self.source.close()

    def __getitem__(self, name: str) -> TensorInfo:
        """What is known of a tensor, as the plain one.

        Raises:
            CheckpointError: there is none of that name.
        """
        return self.tensors[name] if name in self.tensors else self.source[name]

    @property
    def streaming(self) -> bool:
        """See `SafetensorsFolder`."""
        return self.source.streaming

    @streaming.setter
    def streaming(self, on: bool) -> None:
        self.source.streaming = on

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files that are read."""
        return self.source.files

    @property
    def identity(self) -> list:
        """What the decoded numbers depend on beside the files: the form, and the size of its blocks."""
        return [self.form, *self._block] if self.packed else []

    def supports(self, name: str) -> bool:
        """Whether a tensor that is there can be read."""
        return name in self.packed or self[name].dtype in DTYPES

    def holds(self, name: str, dtype: np.dtype) -> bool:
        """Whether a tensor lies in the file just as `dtype` holds it."""
        return name not in self.packed and DTYPES.get(self[name].dtype) == dtype

    def read_elements(self, name: str, start: int, count: int) -> np.ndarray:
        """`count` elements of a tensor that isn't packed; see `SafetensorsFolder`."""
        return self.source.read_elements(name, start, count)

    def read_matrix(self, name: str, width: int, start: int, stop: int, at: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The tensor seen as rows of `width` elements: rows `at` of those from `start` to `stop`, and only these are decoded.

        Args:
            width: the last axis, if the tensor is packed.

        Returns:
            `[n, width]`, as stored, or float32 if packed.

        Raises:
            CheckpointError: no such tensor, or the file ends too early.
        """
        packed = self.packed.get(name)
        if packed is None:
            return self.source.read_matrix(name, width, start, stop, at)
        assert width == packed.info.shape[-1], (name, width, packed.info.shape)
        decode = self._decode_fp8 if packed.info.dtype == _FP8 else self._decode_mxfp4
        return decode(packed, width, start, stop, at)

    # --- fp8 ----------------------------------------------------------------------------------------------------------

    def _find_fp8(self, block) -> None:
        self._block = tuple(block or (0, 0))
        for name, info in self.source.tensors.items():
            if info.dtype == _FP8:
                self._add_fp8(name, info)
            elif name.endswith(_SCALE) and name.removesuffix(_SCALE) not in self.source.tensors:
                self.problems.append(f"tensor {name} is there without {name.removesuffix(_SCALE)}, which it scales")
                del self.tensors[name]

    def _add_fp8(self, name: str, info: TensorInfo) -> None:
        scale = self.source.tensors.get(name + _SCALE)
        self.packed[name] = Packed(dataclasses.replace(info, nbytes=info.nbytes + (scale.nbytes if scale else 0)), name, name + _SCALE)
        self.tensors[name] = self.packed[name].info
        self.tensors.pop(name + _SCALE, None)
        if scale is None:
            self.problems.append(f"tensor {name} has dtype {_FP8}, and there is no {name}{_SCALE}")
            return
        if len(info.shape) < 2 or min(self._block) < 1:
            self.problems.append(f"tensor {name} has shape {list(info.shape)}, which has no blocks of {list(self._block)}")
            return
        needed = (*info.shape[:-2], *(-(-n // size) for n, size in zip(info.shape[-2:], self._block, strict=True)))
        if scale.shape != needed:
            self.problems.append(
                f"tensor {scale.name} has shape {list(scale.shape)}, {name} {list(info.shape)} in blocks of {list(self._block)} needs {list(needed)}"
            )
        if scale.dtype not in ("F32", "BF16"):
            self.problems.append(f"tensor {scale.name} has dtype {scale.dtype}, F32 or BF16 is needed")

    def _decode_fp8(self, packed: Packed, width: int, start: int, stop: int, at: slice | np.ndarray) -> np.ndarray:
        codes = self.source.read_bytes(packed.values, start * width, (stop - start) * width).reshape(-1, width)[at]
        high, wide = self._block
        of = self.source[packed.scales].shape
        rows = np.arange(start, stop)[at]
        matrix, row = np.divmod(rows, packed.info.shape[-2])
        row = matrix * of[-2] + row // high
        first, last = (int(row.min()), int(row.max()) + 1) if len(row) else (0, 0)
        scales = self.source.read_elements(packed.scales, first * of[-1], (last - first) * of[-1]).reshape(-1, of[-1])
        scales = scales.view(ml_dtypes.bfloat16).astype(np.float32) if scales.dtype == np.uint16 else scales
        values = np.take(_E4M3, codes, mode="clip")  # a code is never beyond the table; not to look makes it twice as fast
        with np.errstate(over="ignore"):
            values *= np.repeat(scales[row - first], wide, axis=1)[:, :width]
        return values

    # --- mxfp4 --------------------------------------------------------------------------------------------------------

    def _find_mxfp4(self) -> None:
        blocks = {name.removesuffix(_BLOCKS) for name in self.source.tensors if name.endswith(_BLOCKS)}
        scales = {name.removesuffix(_SCALES) for name in self.source.tensors if name.endswith(_SCALES)}
        for name in sorted(blocks | scales):
            self.tensors.pop(name + _BLOCKS, None)
            self.tensors.pop(name + _SCALES, None)
            if name in blocks & scales and name not in self.source.tensors:
                self._add_mxfp4(name, self.source[name + _BLOCKS], self.source[name + _SCALES])
                continue
            there = [name + end for end, held in ((_BLOCKS, blocks), (_SCALES, scales), ("", self.source.tensors)) if name in held]
            self.problems.append(f"of {name}{_BLOCKS} and {name}{_SCALES}, which belong together and alone, there is {' and '.join(there)}")

    def _add_mxfp4(self, name: str, blocks: TensorInfo, scales: TensorInfo) -> None:
        groups = blocks.shape[-2] if len(blocks.shape) > 1 else 0
        shape, nbytes = (*blocks.shape[:-2], groups * _GROUP), blocks.nbytes + scales.nbytes
        self.packed[name] = Packed(TensorInfo(name, _MXFP4, shape, blocks.file, blocks.start, nbytes), blocks.name, scales.name)
        self.tensors[name] = self.packed[name].info
        if len(blocks.shape) < 3 or blocks.shape[-1] != _GROUP // 2:
            self.problems.append(f"tensor {blocks.name} has shape {list(blocks.shape)}, [rows, groups, {_GROUP // 2}] is needed")
        elif scales.shape != blocks.shape[:-1]:
            self.problems.append(
                f"tensor {scales.name} has shape {list(scales.shape)}, {blocks.name} {list(blocks.shape)} needs {list(blocks.shape[:-1])}"
            )
        for info in (blocks, scales):
            if info.dtype != _MXFP4:
                self.problems.append(f"tensor {info.name} has dtype {info.dtype}, {_MXFP4} is needed")

    def _decode_mxfp4(self, packed: Packed, width: int, start: int, stop: int, at: slice | np.ndarray) -> np.ndarray:
        groups = width // _GROUP
        codes = self.source.read_bytes(packed.values, start * width // 2, (stop - start) * width // 2).reshape(-1, groups, _GROUP // 2)[at]
        scales = self.source.read_bytes(packed.scales, start * groups, (stop - start) * groups).reshape(-1, groups)[at]
        where = scales.astype(np.uint16)[:, :, None] * np.uint16(256) + codes
        return np.take(_SCALED, where, axis=0, mode="clip").reshape(len(codes), width)


def open_source(folder: Path) -> Unpacked:
    """Opens a Hugging Face folder; tensors that its config.json says are quantized appear as plain ones.

    Raises:
        CheckpointError: see `SafetensorsFolder`. A config.json that is missing or damaged shows when the model is read from it.
    """
    source = SafetensorsFolder(folder)
    try:
        return Unpacked(source, _quantization_config(folder))
    except BaseException:
        source.close()
        raise


def _quantization_config(folder: Path) -> dict | None:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)] if isinstance(config, dict) else []
    found = [part["quantization_config"] for part in parts if isinstance(part.get("quantization_config"), dict)]
    return found[0] if found else None
