"""What a model is asked to do on a mesh: how many sequences, how long, in which precision, and how many experts stay on a device.

A workload knows nothing of a model or a machine; what follows from it for one device takes a `Layout`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from sharding.split import Layout, SplitError

Dtype = Literal["bfloat16", "float32"]
WIDTH = {"bfloat16": 2, "float32": 4}
"""Bytes of a number, by dtype."""


TOKEN_BUCKETS = (32, 128, 512)
"""Tokens in a prefill step."""


def check_prefill_tokens(n: int) -> None:
    """Raises ValueError for a number of tokens that no prefill step has: one of `TOKEN_BUCKETS`, or twice the last and so on."""
    most = TOKEN_BUCKETS[-1]
    doubled = n > most and n % most == 0 and (n // most).bit_count() == 1
    if n not in TOKEN_BUCKETS and not doubled:
        raise ValueError(f"prefill_tokens = {n}: choose {', '.join(map(str, TOKEN_BUCKETS))}, {2 * most}, {4 * most} and so on")


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sequences that are decoded together, and how.

    Attributes:
        rows: sequences in the whole mesh.
        prompt: tokens of each prompt.
        new_tokens: tokens that each sequence is continued by.
        prefill_tokens: the most tokens of a prefill step in a group of devices that share their sequences (`Layout.shards` groups).
        dtype: of weights and activations.
        kv_dtype: of cached keys and values.
        slots: experts of each MoE layer that a device has room for, the others staying in its host's memory; None for all of its experts.
        staging: further slots of a device that all layers share, for experts that pass through; without `slots` there are none.
        copies: of experts of each MoE layer that stand beside the model's own, over all devices (`sharding.placement.replicas`).

    Raises:
        ValueError: a field that is not what it has to be; the message names it and its value.
    """

    rows: int = 1
    prompt: int = 512
    new_tokens: int = 128
    prefill_tokens: int = 512
    dtype: Dtype = "bfloat16"
    kv_dtype: Dtype = "bfloat16"
    slots: int | None = None
    staging: int = 2
    copies: int = 0

    def __post_init__(self):
        least = {"rows": 1, "prompt": 1, "new_tokens": 1, "prefill_tokens": 1, "slots": 1, "staging": 0, "copies": 0}
        for field, smallest in least.items():
            n = getattr(self, field)
            if field == "slots" and n is None:
                continue
            if isinstance(n, bool) or not isinstance(n, int) or n < smallest:
                raise ValueError(f"{field} = {n!r}: a workload needs a whole number here, at least {smallest}")
        if self.copies and self.slots is not None:
            raise ValueError(f"copies = {self.copies} with slots = {self.slots}: copies are of experts that all stay on their devices")
        check_prefill_tokens(self.prefill_tokens)
        for field in ("dtype", "kv_dtype"):
            if getattr(self, field) not in get_args(Dtype):
                raise ValueError(f"{field} = {getattr(self, field)!r}: choose from {', '.join(get_args(Dtype))}")

    @property
    def positions(self) -> int:
        """Positions that each sequence ends with, those of its prompt included."""
        return self.prompt + self.new_tokens

    @property
    def resident(self) -> bool:
        """Whether all experts stay on the devices."""
        return self.slots is None

    def held_experts(self, experts: int, layout: Layout) -> int:
        """Experts of each MoE layer that a device has, copies among them.

        Raises:
            SplitError: copies that don't divide among the devices, or that there is only one device for.
        """
        devices = layout.size(layout.experts)
        if self.copies and (devices == 1 or (experts + self.copies) % devices):
            raise SplitError(f"copies = {self.copies}: {experts} experts and copies don't divide among {devices} devices ({layout.split})")
        return (experts + self.copies) // devices

    def local_rows(self, layout: Layout) -> int:
        """Sequences of each group of devices.

        Raises:
            SplitError: they don't divide evenly.
        """
        if self.rows % layout.shards:
            raise SplitError(f"rows = {self.rows} don't divide among {layout.shards} groups of devices ({layout.split}): use a multiple")
        return self.rows // layout.shards

    def decode_tokens(self, layout: Layout) -> int:
        """Tokens of a decode step in each group of devices: one a sequence. See `local_rows`."""
        return self.local_rows(layout)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: Any) -> Workload:
        """The inverse of `to_json`; fields that are missing have their defaults.

        Raises:
            ValueError: a field that isn't known, or as the class.
        """
        if not isinstance(data, dict):
            raise ValueError(f"workload = {data!r}: an object with the fields of a workload is needed")
        known = [f.name for f in dataclasses.fields(Workload)]
        for name in data:
            if name not in known:
                raise ValueError(f"workload.{name} is not known: choose from {', '.join(known)}")
        return Workload(**data)
