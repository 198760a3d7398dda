"""A second copy of each process's arrays in its neighbour's memory, so that a restart needs no disk.

After REFT (in-memory fault tolerance), by replication: process p keeps the bytes that its devices hold, and those of process p - 1, in a folder that
is held in memory and outlives the process. They travel by a collective, in blocks. One process that drives several groups of devices works alike: a
group then stands for a process. Nothing here knows of saving to disk.
"""

from checkpoints.neighbour.copies import BLOCK_BYTES, NeighbourCopy

__all__ = ["BLOCK_BYTES", "NeighbourCopy"]
