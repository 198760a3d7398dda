"""Serving with the host sending experts: the steps of `programs`, layer by layer, over a link that may be emulated.

A prompt's groups of layers are ranges of layers here. Between two groups the batch waits on the device, and others go by.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxmoe.cache.batch import Batch
from jaxmoe.engine import steps
from jaxmoe.engine.host_driven import HostDriven
from jaxmoe.engine.model import Model
from jaxmoe.engine.serving.programs import drawn
from jaxmoe.engine.serving.types import ServeSpec
from jaxmoe.nn.transformer import layer_groups
from jaxmoe.offload.link import Link


class HostPrograms:
    """In the place of `runner.FusedPrograms`. Attributes: `driver` what steps, `link` what experts cross."""

    def __init__(self, model: Model, spec: ServeSpec, source: Any, link: Link | None = None):
        """
        Args:
            model: with a slot bank, whose store is not used.
            spec: sizes; each of a burst's tokens is a step of its own, driven from here.
            source: where records come from (`jaxmoe.experts.source`).
            link: what they cross; a real one if not given.
        """
        model = model.for_positions(spec.positions)
        self.driver = HostDriven(model.spec, model.bank, model.kernels, False, source, link)
        self._model, self._burst, self._edges = model, spec.burst, layer_groups(model.spec, spec.groups)
        self._layers = model.spec.n_layers
        kernels = model.kernels
        self._draw = jax.jit(lambda logits, sampling, positions, adjust: drawn(logits, sampling, positions, adjust, kernels))

    @property
    def link(self) -> Link:
        """What experts cross."""
        return self.driver.link

    @property
    def stalled(self) -> float:
        """Seconds that the host waited for experts."""
        return self.driver.stalled

    def decode(self, state, rows, tokens, positions, budget, tables, eos, sampling, adjust):
        """See `programs.decode_step`; several tokens are as many steps."""
        left, out, more = np.array(budget), np.full((self._burst, len(rows)), -1, np.int32), ()
        for i in range(self._burst if adjust is None else 1):
            live = left > 0
            if not live.any():
                break
            batch = self.driver.programs.decode_batch(rows, tokens, positions, live).replace(tables=tables)
            new, state, more = self._whole(state, batch, sampling, positions + 1, adjust)
            new = np.asarray(new)
            out[i] = np.where(live, new, -1)
            tokens, positions = np.where(live, new, tokens), np.where(live, positions + 1, positions)
            left = np.where(live & ~np.isin(new, eos), left - 1, 0)
        return out, state, more, ()

    def prompts(self, state, batch: Batch, sampling, positions, adjust):
        """See `programs.prompts_step`."""
        return *self._whole(state, batch, sampling, positions, adjust), ()

    def _whole(self, state: steps.EngineState, batch: Batch, sampling, positions, adjust):
        params = self._model.params
        way, state = self.driver.through(params, state, self.driver.start(params, batch), batch, 0, self._layers)
        new, more = self._draw(self.driver.logits(params, way, batch), sampling, positions, adjust)
        return new, state, more

    def park(self, tokens: int) -> None:
        """A wave before its first group."""
        return None

    def group(self, state, parked, batch: Batch, group: int, sampling, positions, adjust):
        """See `programs.group_step`; `group` counts groups of layers."""
        params, last = self._model.params, self._edges[group + 1]
        way = self.driver.start(params, batch) if parked is None else parked
        way, state = self.driver.through(params, state, way, batch, self._edges[group], last)
        if last < self._layers:
            return None, state, way, ()
        new, more = self._draw(self.driver.logits(params, way, batch), sampling, positions, adjust)
        return new, state, None, more
