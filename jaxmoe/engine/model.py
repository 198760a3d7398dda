"""A model ready to run: its spec, its arrays, and what they weigh."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.load import Checkpoint
from jaxmoe.experts import ResidentBank
from jaxmoe.spec import ModelSpec, stack_layers
from pallas_kernels.dispatch import Kernels


@dataclasses.dataclass(frozen=True)
class Model:
    """Attributes: `spec`, `kernels` (static); `params` the segmented tree; `bank` the experts; `folder` the checkpoint it came from."""

    spec: ModelSpec
    params: dict
    bank: Any
    kernels: Kernels
    folder: Path | None = None

    def bytes(self) -> dict[str, int]:
        """Bytes of the arrays on device, by kind, counted from the leaves."""

        def count(tree) -> int:
            return sum(x.nbytes for x in jax.tree.leaves(tree))

        return {"params": count(self.params), "experts": count(self.bank)}

    def bytes_per_token(self, rows: int = 1) -> int:
        """Bytes of weights that one decode step of `rows` sequences has to read, if no two sequences share an expert.

        The embedding counts when it is also the output matrix; else only its looked-up rows are read, which are few.
        """
        dense = self.bytes()["params"]
        if "lm_head" in self.params:
            dense -= self.params["embed"]["table"].nbytes
        router, _ = self.spec.moe
        return dense + min(rows * router.active, router.experts) * sum(self.spec.expert_bytes())


def load_model(checkpoint: Checkpoint, dtype: str, kernels: Kernels, unroll: bool | None = None) -> Model:
    """Restores a converted checkpoint onto the default device.

    Args:
        checkpoint: from `checkpoints.load.open_checkpoint`.
        dtype: 'float32' or 'bfloat16', how weights are held and activations computed.
        kernels: which implementations run.
        unroll: keep one array a layer instead of scanning over stacked ones; the CPU's default, where it spares copies.

    On the CPU a tied embedding gets a transposed copy as the output matrix: XLA there multiplies few rows with [V, D] at half the speed of [D, V].
    """
    spec = checkpoint.spec.with_precision(dtype)
    unroll = kernels.backend == "cpu" if unroll is None else unroll
    layered = checkpoint.restore_params(spec)
    params = stack_layers(spec, layered, tuple if unroll else jnp.stack)
    if kernels.backend == "cpu" and "lm_head" not in params:
        params["lm_head"] = {"kernel": jnp.array(params["embed"]["table"].T)}
    arrays = checkpoint.restore_bank(spec)
    bank = ResidentBank(arrays["w_in"], arrays["w_out"], spec.moe[1].activation)
    return Model(spec, params, bank, kernels, checkpoint.folder)
