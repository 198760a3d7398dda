"""Paged attention: queries of many sequences on one axis, over keys and values that lie in pages.

One contract for decoding, for pieces of prompts and for verifying trees of drafts, also in one step together. The pool of pages is flat over layers,
so that no layer is ever sliced out of it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.compat import interpret_gpu
from pallas_kernels.dispatch import Kernels, first_that_takes
from pallas_kernels.paged_attention import gpu, reference, tpu, xla
from pallas_kernels.paged_attention.types import Pages, Partial, Queries, finish, unpacked


def paged_attention(
    q_THC: Float[Array, "T H C"],
    pages: Pages,
    queries: Queries,
    scale: float,
    kernels: Kernels,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Float[Array, "H"] | None = None,
) -> Float[Array, "T H V"]:
    """Each query's sum of the values that it sees, weighted by the softmax of its scores.

    A score is `scale * q . k`, then `soft_cap * tanh(score / soft_cap)`, then plus the slot's bias. Which keys a query sees is said in `Queries`.

    Args:
        q_THC: queries; query head h reads KV head h // (H / K).
        pages: keys and values. Page ids in `queries.page_table` that hold keys must be pages of the pool: not checked, since they are not known when
            traced; one that is not reads another page, or none.
        queries: which rows belong to which sequence, and where its keys are.
        scale: what a score is multiplied with, mostly C^-0.5.
        kernels: which implementation.
        window: a query sees only the last `window` keys up to its own position.
        soft_cap: bound on scores; none if None.
        sinks_H: scores of one more key for every query, whose value is zero (gpt-oss).

    Returns:
        [T, H, V] in q's dtype; zeros in rows of no sequence.

    Raises:
        ValueError: shapes or dtypes that don't belong together.
        NotImplementedError: no implementation takes these arguments.
    """
    if sinks_H is not None and sinks_H.shape != q_THC.shape[1:2]:
        raise ValueError(f"expected sinks [H], got {list(sinks_H.shape)} for queries {list(q_THC.shape)}")
    return finish(partial_attention(q_THC, pages, queries, scale, kernels, window, soft_cap), sinks_H, q_THC.dtype)


def partial_attention(
    q_THC: Float[Array, "T H C"],
    pages: Pages,
    queries: Queries,
    scale: float,
    kernels: Kernels,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Partial:
    """`paged_attention` over some of the keys, to be merged with that over others (`types.merge`) before sinks and division (`types.finish`).

    The page table then holds a part of the keys, and `queries.first` counts from the first of them.
    """
    q_THC, pages, queries = jax.tree.map(jnp.asarray, (q_THC, pages, queries))
    as_given, pages = pages, _checked(q_THC, pages, queries)
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys: a query sees at least one")
    args = (q_THC, pages, queries, float(scale), window, soft_cap)
    plain = ("xla", functools.partial(xla.paged_attention, *args))
    order: list[tuple[str, Any]] = [plain]
    if kernels.backend == "reference":
        order = [("reference", functools.partial(reference.paged_attention, *args))]
    elif kernels.backend == "gpu" and kernels.pallas:
        interpret = interpret_gpu() if kernels.interpret else False
        order = [("mosaic_gpu", functools.partial(gpu.paged_attention, *args, interpret=interpret)), plain]
    elif kernels.backend == "tpu" and kernels.pallas:
        interpret_tpu = pltpu.InterpretParams() if kernels.interpret else False
        order = [("mosaic_tpu", functools.partial(tpu.paged_attention, q_THC, as_given, *args[2:], interpret=interpret_tpu)), plain]
    return first_that_takes("paged_attention", order)


def _checked(q_THC, pages: Pages, queries: Queries) -> Pages:
    """The pages, not packed; raises ValueError where something does not fit, with both shapes."""

    def fits(good: bool, expected: str, *arrays) -> None:
        if not good:
            raise ValueError(f"expected {expected}, got {' beside '.join(f'{a.dtype} {list(a.shape)}' for a in arrays)}")

    fits(q_THC.ndim == 3 and q_THC.dtype in (jnp.float32, jnp.bfloat16), "queries [T, H, C] of float32 or bfloat16", q_THC)
    held = pages.k.dtype in (jnp.float32, jnp.uint16, jnp.int8)
    fits(pages.k.ndim == 4 and held, "keys [P, K, W, C] of float32, uint16 or int8", pages.k, q_THC)
    if pages.v is not None:
        fits(pages.v.shape[:3] == pages.k.shape[:3] and pages.v.ndim == 4 and pages.v.dtype == pages.k.dtype,
             "values [P, K, W, V] held as the keys are", pages.v, pages.k)  # fmt: skip
    pages = unpacked(pages, q_THC.shape[2])
    k, v = pages.k, pages.v
    fits(q_THC.shape[1] % k.shape[1] == 0, "query heads that are a multiple of KV heads", q_THC, k)
    if v is None and (pages.value_width is None or not 0 < pages.value_width <= k.shape[3]):
        raise ValueError(f"values are the first channels of the keys, of {k.shape[3]}, but value_width is {pages.value_width}")
    for name, scales in (("k_scales", pages.k_scales), ("v_scales", pages.v_scales)):
        wanted = k.dtype == jnp.int8 and (name == "k_scales" or v is not None)
        if (scales is not None) != wanted:
            raise ValueError(f"{name} {'are missing' if wanted else 'are given'} for {k.dtype} keys{'' if v is not None else ' without values'}")
        if scales is not None:
            fits(scales.shape == k.shape[:3], f"{name} [P, K, W]", scales, k)
    if pages.bias is not None:
        p, heads, width = k.shape[:3]
        fits(pages.bias.shape in ((p, heads, width), (p, 1, width)), "a bias [P, 1 or K, W]", pages.bias, k)
    table = queries.page_table
    fits(table.ndim == 2 and jnp.issubdtype(table.dtype, jnp.integer), "a page table [B, X] of whole numbers", table)
    for name in ("rows", "lengths", "keys", "first"):
        fits(getattr(queries, name).shape == table.shape[:1], f"{name} [B]", getattr(queries, name), table)
    if queries.tree is not None:
        fits(queries.tree.ndim == 2 and queries.tree.shape[0] == q_THC.shape[0] and queries.tree.dtype == jnp.uint32, "tree masks uint32 [T, U]",
             queries.tree, q_THC)  # fmt: skip
    if queries.most < 1:
        raise ValueError(f"at most {queries.most} rows a sequence: at least one is needed")
    return pages
