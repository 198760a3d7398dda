"""All residency policies by name."""

from __future__ import annotations

from jaxmoe.residency.ahead import LOOKAHEAD, OPT, PLEC
from jaxmoe.residency.arc import ARC, FATE
from jaxmoe.residency.counts import LFU, LRU, STATIC
from jaxmoe.residency.distance import EAM, EDGEMOE, HOBBIT
from jaxmoe.residency.policy import Policy

POLICIES: dict[str, Policy] = {p.name: p for p in (LRU, LFU, STATIC, ARC, FATE, EDGEMOE, HOBBIT, EAM, PLEC, LOOKAHEAD, OPT)}

DEFAULT = "lfu"


def find_policy(name: str) -> Policy:
    """The policy of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"there is no residency policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]
