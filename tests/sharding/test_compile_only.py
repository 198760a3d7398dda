"""The compile-only targets themselves: what they refuse, and that the bytes they report are those of the program."""

import jax
import jax.numpy as jnp
import pytest

from sharding import compile_only
from sharding.compile_only import MissingCompiler, compile_for, compile_with_host, devices

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


@pytest.mark.parametrize("target", ["h100", "v5e:2x2"])
def test_host_operands_stay_in_host_memory(target):
    a, b = jax.ShapeDtypeStruct((64, 256, 128), jnp.float32), jax.ShapeDtypeStruct((4, 256, 128), jnp.float32)
    one = 256 * 128 * 4

    def f(tree, pool, i):
        records = [jax.device_put(jax.lax.dynamic_slice_in_dim(x, i, 1, 0), jax.memory.Space.Device) for x in tree.values()]
        return jax.lax.dynamic_update_slice_in_dim(pool, sum(records), i, 0)

    args = {"a": a, "b": a}, b, jax.ShapeDtypeStruct((), jnp.int32)
    program = compile_with_host(target, f, *args, host={0}, donate=(1,))
    assert "S(5)" in program.text.splitlines()[0]
    assert program.host_argument_size == 2 * 64 * one
    assert 4 * one < program.argument_size <= 4 * one + 1024
    assert program.alias_size == 4 * one
    assert program.temp_size <= 3 * one + 65536 and program.host_temp_size == 0
    kept = compile_with_host(target, f, *args, host=(), donate=())
    assert (kept.host_argument_size, kept.alias_size) == (0, 0) and kept.argument_size >= (2 * 64 + 4) * one


@pytest.mark.parametrize("target", ["h100", "v5e:2x2"])
def test_options_reach_the_compiler(target):
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    with pytest.raises(Exception, match="xla_no_such_option"):
        compile_with_host(target, jnp.tanh, x, host=(), options={"xla_no_such_option": True})
