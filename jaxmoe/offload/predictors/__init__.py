"""Predictors of routing: which experts the layers to come, and the steps to come, will ask for. One small file each."""

from __future__ import annotations

from jaxmoe.offload.predictors.corrected import JOINS, corrected
from jaxmoe.offload.predictors.eam import EAM
from jaxmoe.offload.predictors.foresee import foresee, foresee_layers
from jaxmoe.offload.predictors.frequency import FREQUENCY, PREVIOUS
from jaxmoe.offload.predictors.gate import GATE
from jaxmoe.offload.predictors.interface import Predictor, Sizes, common_sizes, sizes_of
from jaxmoe.offload.predictors.oracle import ORACLE
from jaxmoe.offload.predictors.path import PATH
from jaxmoe.offload.predictors.readme import README
from jaxmoe.offload.predictors.transitions import TRANSITIONS

PREDICTORS: dict[str, Predictor] = {
    predictor.name: predictor for predictor in (FREQUENCY, PREVIOUS, TRANSITIONS, EAM, PATH, README, GATE, ORACLE)
}
"""By name."""


def find_predictor(name: str) -> Predictor:
    """The predictor of this name, or of two names joined by '+': what the first says before a step, corrected within it by the second.

    Raises:
        ValueError: there is none, or the two don't go together.
    """
    first, *more = name.split(JOINS)
    for part in (first, *more):
        if part not in PREDICTORS:
            raise ValueError(f"there is no predictor {part!r}: choose one of {', '.join(PREDICTORS)}, or two as path+gate")
    if len(more) > 1:
        raise ValueError(f"the predictor {name!r}: at most two go together")
    return corrected(PREDICTORS[first], PREDICTORS[more[0]]) if more else PREDICTORS[first]


__all__ = ["JOINS", "PREDICTORS", "Predictor", "Sizes", "common_sizes", "find_predictor", "foresee", "foresee_layers", "sizes_of"]
