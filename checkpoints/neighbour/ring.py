"""Groups of devices in a ring: what they send to the next one or to all, and how an error in one process reaches the others.

It knows rows of numbers, one a group, and not what they mean. Every method is a collective: all processes call it alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints.errors import CheckpointError

CRC_BYTES = 4
"""At the end of a sealed row."""


class Ring:
    """Groups of devices.

    Attributes:
        count: how many there are.
        group_of: the group that a device is in.
        local: the groups that this process drives.

    Args:
        groups: devices, group by group.
    """

    def __init__(self, groups: Sequence[Sequence[jax.Device]]):
        self.count = len(groups)
        self.group_of = {device: group for group, devices in enumerate(groups) for device in devices}
        self.local = [group for group, devices in enumerate(groups) if devices[0].process_index == jax.process_index()]
        mesh = Mesh(np.array([devices[0] for devices in groups]), ("group",))
        self._by_group = NamedSharding(mesh, PartitionSpec("group"))
        self._rolls = {shift: jax.jit(lambda x, shift=shift: jnp.roll(x, shift, 0), out_shardings=self._by_group) for shift in (1, -1)}
        self._replicate = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def roll(self, rows: dict[int, np.ndarray], shift: int) -> dict[int, np.ndarray]:
        """Sends each group's row to the next (shift 1) or to the one before (-1); gives what the local groups receive."""
        moved = self._rolls[shift](self._stacked(rows))
        return {_row_of(shard.index): np.asarray(shard.data)[0] for shard in moved.addressable_shards}

    def gather(self, rows: dict[int, np.ndarray]) -> np.ndarray:
        """[groups, ...] of every group's row."""
        return np.asarray(self._replicate(self._stacked(rows)).addressable_data(0))

    def together(self, work: Callable[[], Any], where: object) -> None:
        """Does this process's work; raises in all processes where it failed in one, so that none waits for it.

        Raises:
            CheckpointError: of this process's error, which may also be an OSError at `where`, or of another's.
        """
        error: Exception | None = None
        try:
            work()
        except (CheckpointError, OSError) as caught:
            error = caught
        failed = self.gather({group: np.array([error is not None], np.int32) for group in self.local})
        if error is not None:
            raise error if isinstance(error, CheckpointError) else CheckpointError(f"{where}: {error}") from error
        if failed.any():
            raise CheckpointError(f"process {int(failed[:, 0].argmax())} couldn't keep its copy: its own message says why")

    def _stacked(self, rows: dict[int, np.ndarray]) -> jax.Array:
        shape = (self.count, *next(iter(rows.values())).shape)
        return jax.make_array_from_callback(shape, self._by_group, lambda index: rows[_row_of(index)][None])


def _row_of(index: Any) -> int:
    return index[0].start or 0


def seal(row: np.ndarray, size: int) -> None:
    """Puts the checksum of a row's first `size` bytes at its end; it is checked where they arrive."""
    row[-CRC_BYTES:] = np.frombuffer(zlib.crc32(row[:size].data).to_bytes(CRC_BYTES, "little"), np.uint8)


def unseal(row: np.ndarray, size: int, where: object) -> np.ndarray:
    """The first `size` bytes of a row that arrived.

    Raises:
        CheckpointError: they aren't those that were sent.
    """
    row = np.ascontiguousarray(row)
    if zlib.crc32(row[:size].data) != int.from_bytes(row[-CRC_BYTES:].tobytes(), "little"):
        raise CheckpointError(f"{where}: bytes arrived damaged from a neighbour")
    return row[:size]
