"""What a user writes for a lossy setting, as a `Lossy`."""

from __future__ import annotations

from collections.abc import Callable

from jaxmoe.experts.lossy import Lossy

NAMED = {
    "hobbit": "high=0.6,low=0.9,low_bits=4",
    "drop-cold": "cold=0.75",
    "cache-prior": "prior=0.1",
    "fate-prefill": "unpopular=0.25,unpopular_bits=2",
}
"""Published settings by name: HOBBIT's thresholds, BigMoeOnEdge's drop-cold, cache-prior routing, and Fate's two bits for a quarter of a prompt."""

_SHARES, _COUNTS = ("high", "low", "cold", "prior", "unpopular"), ("low_bits", "kept", "reach", "unpopular_bits")
_FIELDS: dict[str, Callable[[str], float]] = dict.fromkeys(_SHARES, float) | dict.fromkeys(_COUNTS, int)


def parse_lossy(text: str, layers: int, experts: int) -> Lossy:
    """A setting from names and `field=value`, by commas: 'hobbit', 'cold=0.5', 'prior=0.1,kept=2', 'bits=4'.

    Args:
        text: see above; `bits=N` brings every missing expert at N bits, the others are fields of `Lossy`.
        layers, experts: of the model.

    Raises:
        ValueError: a name or a value that is none.
    """
    fields: dict = {}
    for part in ",".join(NAMED.get(part.strip(), part.strip()) for part in text.split(",")).split(","):
        name, _, value = part.partition("=")
        if name != "bits" and name not in _FIELDS:
            raise ValueError(f"--lossy {part}: give {', '.join(NAMED)}, bits=N, or one of {', '.join(_FIELDS)} with =value")
        try:
            given = int(value) if name == "bits" else _FIELDS[name](value)
        except ValueError:
            raise ValueError(f"--lossy {part}: {value!r} is no number that {name} can be") from None
        fields |= {"widths": ((given,) * experts,) * layers} if name == "bits" else {name: given}
    return Lossy(**fields)
