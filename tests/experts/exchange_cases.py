"""Devices that each have some of a layer's experts, experts that are cheap to compile, and a plain loop to compare exchanges with."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmoe.experts.exchange import Meeting
from pallas_kernels.dispatch import Kernels
from sharding.split import Layout, Split

CPU = Kernels("cpu")


@flax.struct.dataclass
class Scales:
    """A bank whose experts multiply by a number each. Attributes: `w` [L, E]; `calls` int32 [1], how often it ran: it carries that, as banks may."""

    w: Any
    calls: Any = None

    def split(self) -> tuple[Any, Any]:
        """See `ResidentBank.split`."""
        return dataclasses.replace(self, calls=None), self.calls

    def join(self, moving: Any) -> Any:
        """See `ResidentBank.join`."""
        return dataclasses.replace(self, calls=moving)

    def expert_ffn(self, layer, x, ids, weights, valid, kernels, biases=None):
        """One expert a row; padding gives zeros."""
        y = (x.astype(jnp.float32) * self.w[layer][ids[:, 0]][:, None]).astype(x.dtype)
        return jnp.where(valid[:, None], y, 0), dataclasses.replace(self, calls=self.calls + 1), {}


def meeting(devices: int, experts: int, layer=0, kernels: Kernels = CPU) -> Meeting:
    """Experts divided among so many devices, each with its own tokens."""
    layout = Layout(Split(expert=devices), batch=("expert",), experts=("expert",))
    return Meeting(jnp.int32(layer), experts, layout, kernels)


def met(exchange, devices: int, experts: int):
    """The jitted `(w [L, E], x [n, T, D], ids [n, T, A], valid [n, T]) -> (y [n, T, A, D], calls [n])` of an exchange of `Scales`."""

    def one(w, x, ids, valid):
        y, bank = exchange(Scales(w, jnp.zeros(1, jnp.int32)), meeting(devices, experts, 1), x[0], ids[0], valid[0])
        return y[None], bank.calls

    by = P("expert")
    mesh = Split(expert=devices).mesh()
    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=(P(None, "expert"), by, by, by), out_specs=by, check_vma=False))


def expected(w, x, ids, valid) -> np.ndarray:
    """What `met` gives, by a plain loop on the host."""
    out = np.zeros((*ids.shape, x.shape[-1]), x.dtype)
    for at in np.ndindex(ids.shape):
        if valid[at[:2]]:
            out[at] = (x[at[:2]].astype(np.float32) * w[1, ids[at]]).astype(x.dtype)
    return out


def same_bits(a, b) -> bool:
    """Whether two arrays have the same bits."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
