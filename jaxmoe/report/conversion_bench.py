"""Times conversions beside plain copies of the same files on the same disk, each in a process of its own, whose largest memory is read at its end.

A copy reads and writes every byte and waits until it is on the disk: nothing that makes another folder of the same weights can do less.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from checkpoints.families import hf_tensors, layouts_of
from checkpoints.safetensors_reader import SINGLE
from jaxmoe.spec import ModelSpec

MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu",
    "max_position_embeddings": 32768, "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip
"""Mixtral 8x7B, but for the number of layers and experts."""

_EXPERT_BYTES = 3 * 4096 * 14336 * 2
_PIECE = 32 << 20
_SHARD = 4 << 30

CHILD = """
import json, sys, time
from pathlib import Path
from jaxmoe.report import conversion_bench
print(json.dumps(conversion_bench.work(*json.loads(sys.argv[1]))))
"""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One run: wall seconds, and the most memory that its process held, in bytes; and what it held before it began."""

    seconds: float
    peak: int
    before: int


def mixtral_folder(folder: Path, gigabytes: float) -> Path:
    """A Hugging Face folder of about so many 10^9 bytes: layers and experts as Mixtral 8x7B has them, random bfloat16, in shards of 4 GiB."""
    layers = max(1, round(gigabytes * 1e9 / (8 * _EXPERT_BYTES)))
    experts = max(2, round((gigabytes * 1e9 - 0.53e9 - layers * 84e6) / (layers * _EXPERT_BYTES)))
    config = MIXTRAL | {"num_hidden_layers": layers, "num_local_experts": experts}
    if (folder / "config.json").is_file() and json.loads((folder / "config.json").read_text()) == config:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec = ModelSpec.from_hf(config)
    shapes = {name: shape for name, (shape, _) in hf_tensors(spec, layouts_of(spec)[0]).items()}
    _write(folder, shapes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    numbers = np.random.default_rng(0).integers(0x3800, 0x4000, _PIECE // 2, np.uint16)  # 2^-15 to 2
    numbers |= np.random.default_rng(1).integers(0, 2, _PIECE // 2, np.uint16) << 15
    piece = numbers.data.cast("B")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        if held + 2 * math.prod(shape) > _SHARD and shards[-1]:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += 2 * math.prod(shape)
    files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, part in zip(files, shards, strict=True):
        header, at = {}, 0
        for name, shape in part.items():
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at := at + 2 * math.prod(shape)]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for i, shape in enumerate(part.values()):
                left, start = 2 * math.prod(shape), 2 * (i * 977)  # so that no two tensors are alike
                while left:
                    block = piece[start : start + left]
                    out.write(block)
                    left -= len(block)
                    start = 0
            out.flush()
            os.fsync(out.fileno())
    if len(shards) > 1:
        names = {name: file for file, part in zip(files, shards, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(2 * math.prod(s) for s in shapes.values())}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def run(arm: str, source: Path, out: Path) -> Sample:
    """One run of 'copy', 'convert', 'convert int8', 'convert int4' or 'export' in a process of its own; `out` is removed before and after.

    Raises:
        RuntimeError: it failed.
    """
    shutil.rmtree(out, ignore_errors=True)
    forget(source)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([arm, str(source), str(out)])],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{arm} failed: {done.stderr.strip()[-500:]}")
    return Sample(**json.loads(done.stdout.splitlines()[-1]))


def forget(folder: Path) -> None:
    """Asks the system to drop a folder's files from its memory, so that every run reads them from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def work(arm: str, source: str, out: str) -> dict:
    """What a process does, and what it took."""
    import time

    act = _ACTS[arm.split(" ")[0]](arm)
    before, start = _status("VmRSS"), time.perf_counter()
    act(Path(source), Path(out))
    return {"seconds": time.perf_counter() - start, "peak": _status("VmHWM"), "before": before}


def _status(field: str) -> int:  # not getrusage: its maximum is inherited from the parent process
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(field)).split()[1]) * 1024


def _copying(arm: str):
    from checkpoints.commit import sync_tree

    def copy(source: Path, out: Path) -> None:
        shutil.copytree(source, out)
        sync_tree(out)

    return copy


def _converting(arm: str):
    from checkpoints.convert import convert
    from jaxmoe.compress.round_to_nearest import quantizer

    how = quantizer(int(arm.split("int")[1])) if "int" in arm else None
    return lambda source, out: convert(source, out, quantizer=how)


def _exporting(arm: str):
    from checkpoints.export import export_checkpoint

    return export_checkpoint


_ACTS = {"copy": _copying, "convert": _converting, "export": _exporting}
