"""The measurement of the kernels runs, holds them against float64, and says what it could not measure; its numbers here mean nothing."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.report import kernel_bench, kernel_torch, kernel_tuning
from jaxmoe.report.kernel_bench import FULL, TINY, Bench, records_of
from pallas_kernels import tuned
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.paged_attention import gpu as attention

ROOT = Path(__file__).resolve().parents[2]


def read(folder: Path, stem: str) -> dict:
    return json.loads((folder / f"tiny-{stem}.json").read_text())


def bench(folder: Path) -> Bench:
    return Bench(TINY, folder, bandwidth=10.0, rate=0.05)


def test_every_part_writes_the_records_that_the_driver_waits_for(tmp_path):
    parts = {
        "ceilings": kernel_bench.ceilings, "matmul": kernel_bench.matmul, "attention": kernel_bench.paged, "rivals": kernel_bench.rivals,
        "router": kernel_bench.router, "torch": kernel_torch.peers,
    }  # fmt: skip
    for part, run in parts.items():
        run(bench(tmp_path))
        for name, stem in records_of(part, TINY):
            found = read(tmp_path, stem)
            assert found["name"] == name and found["settings"]["tiny"], stem
            assert "failed" not in found["settings"], found["settings"]
    assert read(tmp_path, "kernel-matmul-bfloat16-tiny-t3")["counters"]["relative_error"] < 1e-6
    assert read(tmp_path, "kernel-swiglu-bfloat16-tiny-t3")["counters"]["rows_checked"] >= 5
    assert "NVIDIA" in read(tmp_path, "kernel-ragged_dot_mgpu-tiny-t3")["settings"]["skipped"]
    assert read(tmp_path, "kernel-torch-matmul-tiny-t3")["settings"]["skipped"].startswith("torch ")


def test_a_wrong_result_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_bench, "kernel_of", lambda op, interpret: lambda x, pool, ids, sizes: jnp.full((x.shape[0], 128), 0.5, jnp.float32))
    kernel_bench.matmul(bench(tmp_path))
    assert read(tmp_path, "kernel-matmul-bfloat16-tiny-t3")["settings"]["failed"].startswith("ValueError: an error of ")


def test_bounds_are_the_larger_of_bytes_and_operations():
    b = Bench(TINY, Path(), bandwidth=100.0, rate=1.0)
    assert b.bound(1e9, 1e9, 0.02) == {"kind": "bandwidth", "ceiling": 100.0, "achieved": 50.0, "unit": "GB/s", "percent": 50.0}
    assert b.bound(1e6, 1e10, 0.02)["kind"] == "compute" and b.bound(1e6, 1e10, 0.02)["percent"] == 50.0


def test_cases_cover_what_is_to_be_measured():
    stems = [stem for part in ("matmul", "quantized", "attention", "rivals", "router", "torch") for _, stem in records_of(part, FULL)]
    assert len(stems) == len(set(stems))
    for model in FULL.models:
        assert {f"kernel-{op}-bfloat16-{model}-t{t}" for op in ("swiglu", "matmul") for t in (1, 8, 64, 512, 8192)} <= set(stems)
        assert {f"kernel-swiglu-{form}-{model}-t1" for form in ("int8", "int4")} <= set(stems)
        assert {f"kernel-attention-bfloat16-{model}-b{b}-r1-s4096" for b in (1, 32)} <= set(stems)


def test_random_routing_gives_every_token_as_many_experts_as_it_needs():
    shape = FULL.models["olmoe-1b-7b"]
    routing = kernel_bench.random_routing(shape, 64)
    assert routing.sizes.sum() == 64 * 8 and routing.sizes.max() <= 64 and len(routing.ids) == 64


def test_quantized_pools_are_what_the_kernel_takes():
    pool = kernel_bench.random_pool("int4", 3, (2, 64, 128), 0)
    assert pool.shape == (3, 2, 64, 128) and pool.scales.shape == (3, 1, 2, 64)
    x, sizes = jax.ShapeDtypeStruct((8, 128), jnp.bfloat16), jax.ShapeDtypeStruct((3,), jnp.int32)
    assert gpu.Problem.of(x, pool, sizes, jnp.bfloat16).bits == 4
    assert kernel_bench.matrix_of(pool, 1).shape == (2, 64, 128)
    assert 0.05 < kernel_bench.matrix_of(pool, 1).std() < 0.12


def test_the_tuner_keeps_the_fastest_and_adds_to_what_is_there(tmp_path, monkeypatch):
    times = iter([3.0, 1.0, float("inf"), 2.0])
    monkeypatch.setattr(kernel_tuning, "_seconds", lambda *args: next(times))
    monkeypatch.setattr(kernel_tuning, "some_of", lambda problem, most: gpu.candidates(problem)[:2])
    monkeypatch.setattr(kernel_tuning, "_right", lambda *args, **kwargs: True)
    said: list[str] = []
    found = kernel_tuning.tune_matmul(TINY, ["bfloat16"], 2, said.append, float("inf"))
    assert [t.seconds for t in found] == [1.0, 2.0] and [t.failed for t in found] == [0, 1] and len(said) == 2
    path = kernel_tuning.write(tmp_path, found[:1])
    kernel_tuning.write(tmp_path, found)
    held = json.loads(path.read_text())
    assert path.name == "cpu.json" and [e["seconds"] for e in held["measured"]] == [1.0, 2.0]
    assert gpu.Config(**held["measured"][0]["config"]) == gpu.candidates(gpu.Problem(**held["measured"][0]["problem"]))[1]
    tuned.read.cache_clear()


def test_a_fast_config_that_is_wrong_is_not_kept():
    assert kernel_tuning.fastest([3.0, 1.0, float("inf"), 2.0], "abcd", lambda config: config != "b") == (2.0, "d")
    assert kernel_tuning.fastest([3.0, float("inf")], "ab", lambda config: False) is None


def test_attention_is_tuned_too(monkeypatch):
    monkeypatch.setattr(kernel_tuning, "_attention_right", lambda *args, **kwargs: True)
    times = iter(range(9, 0, -1))
    monkeypatch.setattr(kernel_tuning, "_attention_seconds", lambda *args: float(next(times, 9)))
    (first, *_) = kernel_tuning.tune_attention(TINY, lambda line: None, float("inf"))
    assert first.seconds == 10 - first.tried and first.tried >= 6 and attention.Config(**first.config).block_keys == 64
    assert first.problem["sequences"] == 2 and first.problem["keys"] == 96


def test_some_configs_are_tried_the_heuristics_first():
    problem = gpu.Problem(m=16, n=1536, k=2048, groups=16, parts=1, bits=16, group=0, out_bytes=4)
    some = kernel_tuning.some_of(problem, 6)
    assert some[0] == gpu.heuristic(problem) and len(some) == len(set(some)) <= 6
    assert all(not problem.why_not(config) for config in some)


@pytest.mark.parametrize(("options", "message"), [(("--only", "matmul,nothing"), "no part 'nothing'"), (("--part", "router"), "needs a GPU")])
def test_the_command_refuses_what_it_cannot_do(options, message, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "bench_kernels_device.py"), "--out", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and message in done.stderr and not list(tmp_path.iterdir())


def test_bad_names_of_things_to_compile_are_refused():
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), "--models", "gpt-5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: --models gpt-5: choose from deepseek-v3, ")


def test_heads_of_a_latent_case_share_one_key(tmp_path):
    shape = dataclasses.replace(TINY.attention["tiny"], kv_heads=1, head_dim=128, value_dim=64, latent=True)
    case = kernel_bench.AttentionCase("tiny", shape, 1, 1, 32, "bfloat16")
    pages = kernel_bench.random_pages(case, 2, 16)
    assert pages.v is None and pages.value_width == 64 and pages.k.shape == (2, 1, 16, 128)
    q = np.ones((1, 4, 128), np.float32)
    exact = kernel_bench.attention_error
    with pytest.raises(ValueError, match="an error of"):
        exact(case, q, pages, np.array([[0, 1]]), np.full((1, 4, 64), 9.0), 0.1)
