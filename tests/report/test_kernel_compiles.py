"""The command that compiles every kernel tells a program that copies its weights from one that does not."""

import dataclasses

import jax
import pytest

from jaxmoe.report import kernel_compiles
from jaxmoe.report.kernel_compiles import Case, compile_case

GPT_OSS = Case("v5e:2x2", "matmul", "gpt-oss-120b", "8", "bfloat16")


@pytest.mark.compile_only
@pytest.mark.parametrize(
    "case",
    [
        GPT_OSS,
        dataclasses.replace(GPT_OSS, target="h100", op="glu", form="int4"),
        Case("v6e:4x4", "attention", "gpt-oss-120b", "decode", "int8"),
    ],
)
def test_what_copies_nothing_passes(case):
    result = compile_case(case)
    assert result.failed is None and result.temporaries < result.weights / 100


@pytest.mark.compile_only
def test_a_copy_of_the_weights_is_a_failure(monkeypatch):
    """XLA's own layout of this pool has the experts last, so that the kernel would read a copy."""
    monkeypatch.setattr(kernel_compiles.matmul_tpu, "pool_formats", lambda pool, on: jax.tree.map(lambda leaf: on, pool))
    result = compile_case(GPT_OSS)
    assert result.failed is not None and "bytes of temporaries beside rows and results" in result.failed and result.temporaries > result.weights


@pytest.mark.compile_only
def test_what_a_kernel_refuses_is_a_failure_that_says_why(monkeypatch):
    monkeypatch.setitem(kernel_compiles.expert_table.SHAPES, "odd", kernel_compiles.expert_table.ExpertShape(96, 80, 4, 2))
    failed = compile_case(Case("h100", "matmul", "odd", "8", "bfloat16")).failed
    assert failed is not None and failed.startswith("NotImplementedError: the kernel makes 64 columns at a time, and 96 ")


def test_every_model_op_and_target_is_there():
    cases = kernel_compiles.cases()
    assert len(set(cases)) == len(cases) == 5 * (2 * 6 * 5 * 3 + 6 * 5 * 2)
