"""A decoder layer and its feed-forward parts as Linen modules."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmoe import formats
from jaxmoe.cache.batch import Batch
from jaxmoe.experts import ExpertBank, expert_ffn
from jaxmoe.experts.sharded import ShardedBank
from jaxmoe.nn.attention import Attention, LatentAttention
from jaxmoe.nn.delta import GatedDelta
from jaxmoe.nn.parts import NORMAL, Held, Linear, held, joined, model_norm
from jaxmoe.routing.route import RouterOut, route
from jaxmoe.spec import ExpertSpec, LayerSpec, ModelSpec, Precision, RouterSpec, SpecError
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.glu import GLUS
from sharding.split import ALONE, Layout


class GatedMLP(nn.Module):
    """A dense gated feed-forward network. Attributes: `summed`, mesh axes that its hidden width is split over."""

    spec: ExpertSpec
    width: int
    precision: Precision
    kernels: Kernels
    summed: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Float[Array, "T D"]) -> jax.Array:
        def linear(name: str, inputs: int, outputs: int, x: jax.Array, summed: tuple[str, ...] = ()) -> jax.Array:
            return Linear((inputs,), (outputs,), self.precision, self.kernels, self.spec.bias, summed, name=name)(x)

        gate, up = (linear(name, self.width, self.spec.width, x) for name in ("gate", "up"))
        return linear("down", self.spec.width, self.width, GLUS[self.spec.activation](gate, up), self.summed)


class Router(nn.Module):
    """Holds the router's weights and calls `route`."""

    spec: RouterSpec
    width: int
    eps: float
    precision: Precision
    kernels: Kernels

    @nn.compact
    def __call__(self, x: Float[Array, "T D"], state: Any, valid: Bool[Array, "T"]) -> tuple[RouterOut, Any]:
        s, zeros, ones = self.spec, nn.initializers.zeros, nn.initializers.ones
        exact = Precision()
        own = exact if s.matmul_dtype == "float32" else self.precision
        params = {"kernel": self.param("kernel", held(NORMAL, own), (self.width, s.experts))}
        if s.logits_bias:
            params["bias"] = self.param("bias", held(zeros, own), (s.experts,))
        if s.select_bias:
            params["select_bias"] = self.param("select_bias", held(zeros, exact), (s.experts,))
        if s.input_norm:
            params["input_scale"] = self.param("input_scale", held(ones, self.precision), (self.width,))
        if s.expert_scale:
            params["expert_scale"] = self.param("expert_scale", held(ones, self.precision), (s.experts,))
        return route(s, params, x, state, valid, self.kernels, self.eps)


class ExpertBias(nn.Module):
    """The biases of a layer's experts: `w_in` [E, 2, F] and `w_out` [E, D]. They stay on the device when experts are streamed.

    Attributes: `summed`, mesh axes that the hidden width is split over: the first device along them adds `w_out`, to its part of the sum.
    """

    experts: int
    spec: ExpertSpec
    width: int
    precision: Precision
    summed: tuple[str, ...] = ()

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        zeros = held(nn.initializers.zeros, self.precision)
        w_in = self.param("w_in", zeros, (self.experts, 2, self.spec.width))
        w_out = self.param("w_out", zeros, (self.experts, self.width))
        return w_in, jnp.where(jax.lax.axis_index(self.summed) == 0, w_out, jnp.zeros_like(w_out)) if self.summed else w_out


def expert_bias(layer: LayerSpec, model: ModelSpec, layout: Layout, bank: ExpertBank) -> tuple[jax.Array, jax.Array]:
    """Within a layer's `@nn.compact`: the biases of the experts that this device has; some may be copies, which a mesh's bank counts."""
    assert layer.router is not None and layer.experts is not None
    experts = bank.experts if isinstance(bank, ShardedBank) else layer.router.experts
    return ExpertBias(experts // layout.size(layout.experts), layer.experts, model.width, model.precision, layout.expert_hidden, name="expert_bias")()


Side = Float[Array, "T D"] | None
"""What a layer has to add to its experts' results: that of its shared expert, or of the dense network beside them."""


class DecoderLayer(nn.Module):
    """Attention, or a delta rule, and a feed-forward part, each behind a norm and added to the residual stream.

    A layer can be run whole ('all'), or in two halves between which its experts are computed elsewhere: 'front' gives what 'finish' takes beside the
    experts' results. Each is called as `apply(params, what, ...)`, with the arguments of the method below of that name.
    """

    spec: LayerSpec
    model: ModelSpec
    kernels: Kernels
    layout: Layout = ALONE

    @nn.compact
    def __call__(self, what: str, *args: Any) -> Any:
        """Runs the method of this name."""
        halves: dict[str, Any] = {"all": self._all, "front": self._front, "finish": self._finish}
        return halves[what](*args)

    def _all(self, x: Float[Array, "T D"], layer, moe_layer, bank: ExpertBank, state, router_state, batch: Batch, tables):
        """Returns `(x, bank, state, router_state, routed)`; `routed` is the RouterOut of a sparse layer, None of a dense one."""
        x, side, y, bank, state, router_state, routed = self._front(x, layer, moe_layer, bank, state, router_state, batch, tables)
        return self._finish(x, side, y), bank, state, router_state, routed

    def _front(self, x, layer, moe_layer, bank: ExpertBank, state, router_state, batch: Batch, tables):
        """Returns `(x, side, y, bank, state, router_state, routed)`: the residual stream after attention, what `finish` takes, and y, what the bank
        gave (None in a dense layer, whose feed-forward part is `side`)."""
        s = self.spec
        x, state = self._attention(x, layer, state, batch, tables)
        h = self._norm("norm_mlp")(x)
        side: Side
        if s.dense is not None:
            with jax.named_scope("mlp"):
                side = GatedMLP(s.dense, self.model.width, self.model.precision, self.kernels, self.layout.mlp, name="mlp")(h)
            if not s.sparse:
                return x, side, None, bank, state, router_state, None
            if not s.post_norms:
                raise SpecError("a dense network beside experts needs post_norms")
            side, into_router, h = self._normed("norm_mlp_own", side), x, self._norm("norm_experts")(x)
        else:
            side, into_router = self._shared(h), h
        y, bank, router_state, routed = self._experts(into_router, h, moe_layer, bank, router_state, batch)
        y = y if self._together else joined(y, self.layout.summed)
        return x, side, y, bank, state, router_state, routed

    def _finish(self, x: Float[Array, "T D"], side: Side, y: Float[Array, "T D"] | None) -> Float[Array, "T D"]:
        """The residual stream after the layer."""
        s = self.spec
        if y is not None and s.dense is not None:
            y = self._normed("norm_experts_out", y)
        out: Any = side if y is None else y if side is None else y + side
        if y is not None and self._together:
            out = joined(out, self.layout.summed)
        if s.post_norms:
            out = self._normed("norm_mlp_out", out)
        x = self._added(x, out)
        return formats.rounded(x * formats.load(Held("scale", (1,), self.model.precision, name="layer_scale")(), x.dtype)) if s.layer_scale else x

    def _attention(self, x, layer, state, batch: Batch, tables):
        s = self.spec
        with jax.named_scope("attention"):
            h = self._norm("norm_attn")(x)
            if s.delta is not None:
                module = GatedDelta(s.delta, self.model.width, self.model.norm_eps, self.model.precision, self.kernels, self.layout, name="delta")
                h, state = module(h, layer, state, batch)
            else:
                assert s.attention is not None, "a layer has attention or a delta rule"
                kind = Attention if s.attention.latent is None else LatentAttention
                h, state = kind(s.attention, self.model, self.kernels, self.layout, name="attn")(h, layer, state, batch, tables)
            return self._added(x, self._normed("norm_attn_out", h) if s.post_norms else h), state

    def _shared(self, h: Float[Array, "T D"]) -> Side:
        s, m = self.spec, self.model
        if s.shared is None:
            return None
        with jax.named_scope("shared"):
            summed = () if self._together else self.layout.shared
            out = GatedMLP(s.shared, m.width, m.precision, self.kernels, summed, name="shared")(h)
            if s.shared_gate:
                out = formats.rounded(jax.nn.sigmoid(Linear((m.width,), (1,), m.precision, self.kernels, name="shared_gate")(h)) * out)
            return out

    def _experts(self, into_router, h, moe_layer, bank: ExpertBank, router_state, batch: Batch):
        s, m, valid = self.spec, self.model, batch.segments >= 0
        assert s.router is not None and s.experts is not None
        with jax.named_scope("route"):
            router = Router(s.router, m.width, m.norm_eps, m.precision, self.kernels, name="router")
            routed, router_state = router(into_router, router_state, valid)
        ids, weights = routed.ids, routed.weights
        if getattr(bank, "lossy", None) is not None:
            ids, weights, bank = bank.degrade(
                moe_layer, routed, s.router, self.variables["params"]["router"], valid, h.dtype, self.kernels
            )
        if s.router.apply == "input":  # one expert a token: its input is scaled, and its result taken as it is
            h, weights = h * weights.astype(h.dtype), jnp.where(valid[:, None], 1.0, 0.0)
        more = {}
        if s.experts.bias:
            more["biases"] = expert_bias(s, m, self.layout, bank)
        with jax.named_scope("experts"):
            y, bank, _ = expert_ffn(bank, moe_layer, h, ids, weights, valid, self.kernels, **more)
        return y, bank, router_state, routed._replace(inputs=into_router)

    @property
    def _together(self) -> bool:
        """Whether the shared expert's part of a sum over devices is added to the experts' parts first, so that one sum does for both."""
        shared, layout = self.spec.shared, self.layout
        return shared is not None and not shared.bias and self.spec.dense is None and set(layout.shared) == set(layout.summed) != set()

    def _norm(self, name: str):
        return model_norm(self.model, self.kernels, name=name)

    def _normed(self, name: str, h: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """What is normalised to be added to something."""
        return formats.rounded(self._norm(name)(h))

    def _added(self, x: jax.Array, h: jax.Array) -> jax.Array:
        """`x + residual_scale * h`, the product rounded by itself."""
        scale = self.model.residual_scale
        return x + (h if scale == 1.0 else formats.rounded((h.astype(jnp.float32) * scale).astype(h.dtype)))


FINISHING = ("norm_mlp_out", "norm_experts_out", "layer_scale")
"""The weights that 'finish' uses, where a layer has them."""
