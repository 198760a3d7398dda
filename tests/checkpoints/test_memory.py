"""How much memory conversion and single reads take, measured in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoints import hf_folders

REPOSITORY = Path(__file__).resolve().parents[2]

CONFIG = {
    **hf_folders.CONFIGS["mixtral"],
    "vocab_size": 7168,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "num_hidden_layers": 1,
}
LARGEST = 7168 * 2048 * 2  # an expert's matrix, the embedding and the output matrix: 29 MB each

MEASURE = """
import json, sys
from pathlib import Path
from checkpoints.convert import convert
from checkpoints.load import open_checkpoint
from tests.checkpoints import hf_folders
tiny = convert(Path(sys.argv[3]), Path(sys.argv[4]))     # loads every module and starts every thread
open_checkpoint(sys.argv[4]).read_expert(0, 0)
def status(field):  # not getrusage: its maximum is inherited from the parent process
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
before = status("VmRSS")
manifest = convert(Path(sys.argv[1]), Path(sys.argv[2]))
print(json.dumps({"growth": status("VmHWM") - before, "nbytes": manifest.nbytes}))
"""


def big_folder(folder: Path, fused: bool) -> Path:
    rng = np.random.default_rng(0)
    shapes = hf_folders.shapes(CONFIG, fused)
    tensors = {
        name: rng.integers(0, 2**15, shape, dtype=np.uint16).view(ml_dtypes.bfloat16) for name, shape in shapes.items()
    }
    return hf_folders.write_folder(folder, CONFIG, tensors, shards=4)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_conversion_holds_one_tensor_and_a_constant(tmp_path, fused):
    """Growth of the peak: at most the largest tensor and 160 MB (writes wait for a slow disk), of about 420 MB converted. Fused tensors are never
    read whole."""
    big_folder(tmp_path / "hf", fused)
    hf_folders.tiny(tmp_path / "tiny", "mixtral", "bfloat16")
    paths = [str(tmp_path / name) for name in ("hf", "out", "tiny", "tiny_out")]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    print(measured)
    assert measured["nbytes"] > 400e6
    assert measured["growth"] > LARGEST / 2  # `down` is held whole: less would mean that nothing was measured
    assert measured["growth"] <= LARGEST + 160e6
