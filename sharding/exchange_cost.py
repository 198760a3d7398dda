"""What the exchanges between tokens and experts send, in closed forms, and the sizes of their buffers, which the exchanges take from here.

Knows shapes alone: no arrays, no machine. `jaxmoe.experts.exchange` is what is counted; tests hold the two together.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

from sharding.split import Exchange

Transport = Literal["whole", "ragged", "rounds"]
"""How rows get to other devices whose number is only known when they are there.

whole: a block with room for the worst case for each device. ragged: the same room, but only the rows that are there travel
(`jax.lax.ragged_all_to_all`). rounds: blocks with room for somewhat more than an even share, as often as it takes.
"""

SMALL = 1 << 18
"""Bytes of a worst case that a device may send for nothing: about what a link carries while a small collective begins and ends (5 us at 50 GB/s)."""

ROOM = 1 << 26
"""Bytes that may be set aside for a worst case. A choice, not a measurement: rows that aren't there cost no link, but are written and read."""

SPARE = 1.25
"""Room in a round, in even shares: what Tutel's authors call the capacity factor."""

WAVE = 4
"""Experts that a device sends at a time, at most."""


class Rooms(NamedTuple):
    """Room for each other device in a round: `tokens` on the way there, `results` on the way back."""

    tokens: int
    results: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer's step. Attributes:
    tokens: of each device, T; where every device has all tokens ('coherent') its share of them.
    active: experts of a token, A.
    experts: of the layer, E.
    devices: that the experts are divided among, n.
    width, hidden: D, and F of an expert on each device.
    nbytes: of a number, in activations as in weights.
    backend: of the devices; see `transport`.
    kv_width: numbers that attention keeps of a token in a layer, keys and values together; 'coherent' alone sends them.
    """

    tokens: int
    active: int
    experts: int
    devices: int
    width: int
    hidden: int
    nbytes: int = 2
    backend: Literal["reference", "cpu", "gpu", "tpu"] = "tpu"
    kv_width: int = 0

    @property
    def count(self) -> int:
        """Experts of each device."""
        return self.experts // self.devices


def transport(backend: str, worst: int) -> Transport:
    """What suits a worst case of so many bytes.

    Turns of unknown number are a loop whose condition a GPU reads back to its host, so there they are for large steps alone, where this is less than
    touching memory for rows that aren't there. XLA's CPU backend has no ragged exchange, and its TPU compiler refuses one on some topologies
    (v5e:16x16: "not supported in limited ICI routing settings"; libtpu of jax 0.10.2).
    """
    if worst <= SMALL:
        return "whole"
    return "ragged" if worst <= ROOM and backend == "gpu" else "rounds"


def coherent_ragged(backend: str, devices: int, tokens: int, width: int, nbytes: int) -> bool:
    """Whether, of all tokens of a group of devices in 'coherent', only those travel that a device has; else blocks with room for all."""
    return backend == "gpu" and devices * tokens * width * nbytes > SMALL


def worst_rooms(tokens: int, active: int, count: int) -> Rooms:
    """For all of a device's tokens to have all of their experts on one device of `count` experts."""
    return Rooms(tokens, tokens * min(active, count))


def even_rooms(tokens: int, active: int, count: int, devices: int) -> Rooms:
    """For `SPARE` even shares, by eights."""
    worst = worst_rooms(tokens, active, count)

    def room(share: float, least: int, most: int) -> int:
        return min(most, max(least, 8 * math.ceil(SPARE * share / 8)))

    pairs = room(tokens * active / devices, min(active, count), worst.results)
    return Rooms(room(devices_of_token(active, devices) / devices * tokens, 1, worst.tokens), pairs)


def devices_of_token(active: int, devices: int) -> float:
    """To how many devices a token goes whose A experts are spread evenly: `n (1 - (1 - 1/n)^A)`."""
    return devices * (1 - (1 - 1 / devices) ** active)


def wave_size(experts: int, devices: int) -> int:
    """How many experts each device sends at a time, so that what has come takes no more room than a device's own experts of the layer."""
    return max(1, min(WAVE, experts // devices // devices))


def distinct(experts: int, active: int, tokens: float) -> float:
    """Experts that any of so many tokens asks for, each for A of E with equal chances: `E (1 - (1 - A/E)^T)`."""
    return experts * (1 - (1 - active / experts) ** tokens)


def traffic(exchange: Exchange, s: Shape, sums: bool = False) -> float:
    """Bytes that a device sends for one layer's exchange in one step.

    Routing is taken to be even. Ids travel with the tokens, as numbers of the same width. Blocks of a fixed size count whole, a collective's bytes
    times (n - 1) / n as on a ring or a switch. Not counted are collectives of a few numbers.

    - tokens: `n (C (D + J) + R D)` numbers, J = min(A, E / n) ids; C and R are `worst_rooms`, or `even_rooms` in one round; ragged, C = T times
      `devices_of_token` / n, and R = T A / n.
    - gather: `n T (D + A)` numbers gathered and `n T A D` scattered: results are not added up before, which would be in another order, unless
      `sums`: then `n T D` are scattered, and A float32 weights of each token gathered too.
    - weights: `n m` experts of 3 D F numbers in each of W waves; m is `wave_size` and W what the `distinct` experts, evenly on all devices, take.
    - coherent: `n T_all (D + 3)` numbers, T_all = n T, or ragged T (D + 3); and what attention keeps of the tokens, once for all layers of a step.

    Returns:
        Bytes.

    Raises:
        ValueError: an exchange that isn't known.
    """
    n, t, d, a, b = s.devices, s.tokens, s.width, s.active, s.nbytes
    if exchange == "tokens":
        rooms = worst_rooms(t, a, s.count)
        how = transport(s.backend, n * rooms.results * d * b)
        there, back = even_rooms(t, a, s.count, n) if how == "rounds" else rooms
        if how == "ragged":
            there, back = t * devices_of_token(a, n) / n, t * a / n  # type: ignore[assignment]
        sent = n * (there * (d + min(a, s.count)) + back * d) * b
    elif exchange == "gather":
        sent = n * t * ((2 * d + a) * b + 4 * a if sums else (d + a + a * d) * b)
    elif exchange == "weights":
        sent = n * wave_size(s.experts, n) * waves(s) * 3 * d * s.hidden * b
    elif exchange == "coherent":
        ragged = coherent_ragged(s.backend, n, n * t, d, b)
        sent = (t if ragged else n * n * t) * (d + 3) * b + n * t * s.kv_width * b
    else:
        raise ValueError(f"exchange = {exchange!r}: choose from tokens, gather, weights, coherent")
    return sent * (n - 1) / n


def waves(s: Shape) -> int:
    """Waves of the exchange 'weights', for even routing; on a GPU, whose loops are of known length, those that any routing can need."""
    size, pairs = wave_size(s.experts, s.devices), s.devices * s.tokens * s.active
    asked = min(s.count, pairs) if s.backend == "gpu" else distinct(s.experts, s.active, s.devices * s.tokens) / s.devices
    return max(1, math.ceil(asked / size - 1e-9))


def best_exchange(s: Shape, choices: tuple[Exchange, ...] = ("tokens", "gather", "weights"), sums: bool = False) -> Exchange:
    """The exchange that sends least, of equals the first.

    Sending experts pays where tokens are many and experts narrow: about where `3 F E < 2 T A`, both sides divided by D (n - 1) / n. Gathering never
    sends less than blocks with room for the worst case do, if each result goes back by itself; with `sums` it does where tokens are few.
    """
    return min(choices, key=lambda exchange: traffic(exchange, s, sums))
