"""Packed tensors for tests, their decoding by plain loops, and what transformers makes of them.

    python -m tests.checkpoints.packed     # writes data/packed.npz; needs torch and transformers
"""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).parent / "data" / "packed.npz"

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def random_fp8(shape, block, seed=0, scale_dtype=np.float32):
    """Codes (uint8; every code but not-a-number) and scales of as many blocks as it takes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E
    scales = rng.uniform(1e-4, 3.0, (*shape[:-2], *(-(-n // size) for n, size in zip(shape[-2:], block, strict=True))))
    return codes, scales.astype(scale_dtype)


def decode_fp8(codes, scales, block):
    """A number at a time, float32."""
    out = np.empty(codes.shape, np.float32)
    values = codes.view(ml_dtypes.float8_e4m3fn)
    for index in np.ndindex(*codes.shape):
        *lead, row, col = index
        out[index] = np.float32(values[index]) * np.float32(scales[(*lead, row // block[0], col // block[1])])
    return out


def random_mxfp4(shape, seed=0):
    """Blocks and scales of a tensor `shape`; the first rows hold every code, and the scales the smallest and the largest."""
    rng = np.random.default_rng(seed)
    groups = shape[-1] // 32
    blocks = rng.integers(0, 256, (*shape[:-1], groups, 16), dtype=np.uint8)
    scales = rng.integers(110, 140, (*shape[:-1], groups), dtype=np.uint8)
    flat = blocks.reshape(-1)
    flat[: min(256, flat.size)] = np.arange(256, dtype=np.uint8)[: flat.size]
    return blocks, scales


def decode_mxfp4(blocks, scales):
    """A number at a time, float32: `[..., groups * 32]`."""
    out = np.empty((*blocks.shape[:-1], 32), np.float32)
    for index in np.ndindex(*blocks.shape):
        byte = int(blocks[index])
        power = 2.0 ** (int(scales[index[:-1]]) - 127)
        for j, code in enumerate((byte & 15, byte >> 4)):
            sign = -1.0 if code & 8 else 1.0
            out[(*index[:-1], 2 * index[-1] + j)] = sign * E2M1[code & 7] * power
    return out.reshape(*blocks.shape[:-2], -1)


def write(path: Path, tensors: dict) -> None:
    """A safetensors file of arrays, or of (dtype's name, array)."""
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8"}
    header, data = {}, b""
    for name, value in tensors.items():
        kind, array = value if isinstance(value, tuple) else (names[value.dtype.name], value)
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def inputs() -> dict[str, np.ndarray]:
    """What the golden decodes: small, every code of fp8, every byte of mxfp4, and extreme scales."""
    codes, scales = random_fp8((16, 24), (8, 8), seed=1)
    codes.reshape(-1)[:256] = np.arange(256)
    scales[0, 0], scales[1, 2] = 2.0**-130, 3e38
    _, narrow = random_fp8((16, 24), (8, 8), seed=2, scale_dtype=ml_dtypes.bfloat16)
    blocks, powers = random_mxfp4((2, 5, 64), seed=3)
    powers.reshape(-1)[:] = np.tile([0, 1, 2, 126, 127, 128, 252, 253, 254, 255], 2)
    blocks[1] = blocks[0]
    stacked, stacked_scales = random_fp8((2, 4, 6), (2, 2), seed=4)
    return {
        "codes": codes,
        "scales": scales,
        "narrow": narrow.view(np.uint16),
        "stacked": stacked,
        "stacked_scales": stacked_scales,
        "blocks": blocks,
        "powers": powers,
    }


def by_transformers(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same decoded by transformers, in float32 and in bfloat16 (as uint16)."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    def fp8(codes, scales, dtype):
        return Fp8Dequantize(None)._dequantize_one(torch.from_numpy(codes).view(torch.float8_e4m3fn), scales, dtype)

    def plain(x):
        return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()

    out = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        narrow = torch.from_numpy(given["narrow"]).view(torch.bfloat16)
        out[f"fp8_{name}"] = plain(fp8(given["codes"], torch.from_numpy(given["scales"]), dtype))
        out[f"narrow_{name}"] = plain(fp8(given["codes"], narrow, dtype))
        out[f"stacked_{name}"] = plain(fp8(given["stacked"], torch.from_numpy(given["stacked_scales"]), dtype))
        decoded = convert_moe_packed_tensors(torch.from_numpy(given["blocks"]), torch.from_numpy(given["powers"]), dtype=dtype)
        out[f"mxfp4_{name}"] = plain(decoded.transpose(1, 2).contiguous())
    return out


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **by_transformers(inputs()))
    print(GOLDEN, GOLDEN.stat().st_size)
