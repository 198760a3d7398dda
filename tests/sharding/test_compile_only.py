"""The compile-only targets themselves: what they refuse, and that the bytes they report are those of the program."""

import jax
import jax.numpy as jnp
import pytest

from sharding import compile_only
from sharding.compile_only import MissingCompiler, compile_for, devices

pytestmark = pytest.mark.compile_only


@pytest.mark.parametrize("target", ["h100", "v5e:2x2"])
def test_a_matmul_has_its_bytes(target):
    a, b = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16), jax.ShapeDtypeStruct((512, 128), jnp.bfloat16)
    program = compile_for(target, lambda a, b: a @ b, a, b)
    stats = program.memory_analysis()
    assert stats.argument_size_in_bytes == (256 * 512 + 512 * 128) * 2
    assert stats.output_size_in_bytes == 256 * 128 * 2


def test_a_topology_has_its_chips():
    assert len(devices("v5e:4x4")) == 16
    assert "H100" in devices("h100")[0].device_kind


def test_an_unknown_topology_is_named():
    with pytest.raises(ValueError, match="'v9z:2x2'"):
        devices("v9z:2x2")


@pytest.mark.parametrize("target", ["h100", "v6e:2x2"])
def test_a_missing_compiler_names_the_extra(monkeypatch, target):
    monkeypatch.setattr(compile_only, "_installed", lambda module: False)
    with pytest.raises(MissingCompiler, match=r"jaxmoe\[compile\]"):
        devices.__wrapped__(target)
