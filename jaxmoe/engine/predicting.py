"""From the name of a predictor to what a host-driven step asks: fitted on a trace, read from a file, or evaluated from the model's own routers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmoe.engine.foresight import Foresight
from jaxmoe.offload.predictors import JOINS, find_predictor, sizes_of
from jaxmoe.offload.predictors.corrected import params_of
from jaxmoe.offload.trace import Trace
from jaxmoe.spec import ModelSpec
from jaxmoe.train import path_predictor

TRAINED = tuple(path_predictor.NETS)
"""Predictors that come from a file."""

FROM_TRACES = ("eam", "oracle")
"""Predictors that are nothing without a trace."""

GATE_DEPTH = 4
"""Layers ahead at which the model's own routers are asked."""


def check_predictor(name: str, file: Path | None, trace: Trace | None) -> None:
    """Refuses a predictor that does not exist or lacks what it goes by.

    Raises:
        ValueError: that; the message says what to give.
    """
    find_predictor(name)
    parts = name.split(JOINS)
    trained = [part for part in parts if part in TRAINED]
    if trained and file is None:
        raise ValueError(f"the predictor {name!r} is trained: give --predictor-file, which scripts/train.py predictor writes")
    if not trained and file is not None:
        raise ValueError(f"--predictor-file {file}: the predictor {name!r} is not trained; {' and '.join(TRAINED)} are")
    if trace is None and any(part in FROM_TRACES for part in parts):
        raise ValueError(f"the predictor {name!r} goes by a trace of the model: give --expert-trace")


def can_ask_ahead(spec: ModelSpec) -> bool:
    """Whether the model's routers can be asked about activations of layers before theirs."""
    return all(not layer.router.input_norm and layer.router.select == "topk" for layer in spec.layers if layer.router is not None)


def both_predictors(spec: ModelSpec, file: Path | None) -> str | None:
    """The name of what foretells best of what there is: a trained predictor before a step, the model's own routers within it, or either alone.

    Raises:
        ValueError: a file that is damaged or of another model.
    """
    parts = [] if file is None else [path_predictor.load(file, spec).kind]
    return JOINS.join(parts + ["gate"] * can_ask_ahead(spec)) or None


def make_foresight(name: str, spec: ModelSpec, rows: int, file: Path | None = None, traces: Sequence[Trace] = ()) -> Foresight:
    """A predictor ready to run.

    Args:
        name: as `jaxmoe.offload.predictors.find_predictor` takes it.
        spec: the model.
        rows: cache rows of the engine.
        file: of a trained predictor.
        traces: what it is fitted to; may be none for those that learn as they run.

    Raises:
        ValueError: see `check_predictor`, and a file that is damaged or of another model.
    """
    check_predictor(name, file, traces[0] if traces else None)
    depth = max(1, min(GATE_DEPTH, len(spec.moe_layers) - 1)) if "gate" in name.split(JOINS) else 0
    return Foresight(find_predictor(name), fitted(name, spec, file, traces), rows, depth)


def fitted(name: str, spec: ModelSpec, file: Path | None, traces: Sequence[Trace]) -> Any:
    """A predictor's parameters."""

    def of_one(name: str) -> Any:
        if name in TRAINED:
            assert file is not None
            return path_predictor.load(file, spec, name)
        more = {} if name in FROM_TRACES else {"sizes": sizes_of(spec)}
        return find_predictor(name).fit(list(traces), 0, **more)

    return params_of(name, of_one)
