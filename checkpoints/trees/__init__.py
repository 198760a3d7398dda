"""Folders that hold any pytree of arrays: trained models, adapters, predictors, optimizer states.

One Zarr v3 array a leaf, `_METADATA` with which stock Orbax restores the folder, and `tree.json`, which says what is in it: shapes, dtypes, chunks,
and a CRC-32 of each chunk. Processes write what they own into one unfinished folder; process 0 gives it its name when all are done. Nothing here
knows of models, or of when trees are saved.
"""

from checkpoints.trees.format import BEGUN, FORMAT, TREE, VERSION, Keys, TreeInfo, TreeLeaf, dtype_of, read_tree
from checkpoints.trees.leaves import as_array, describe, named_leaves
from checkpoints.trees.pieces import CHUNK_BYTES, Piece, chunk_shape, on_host, own_view
from checkpoints.trees.read import LeafReader, Placement, as_like, is_complete, is_host_leaf, place, restore_tree, verify_tree
from checkpoints.trees.write import TreeWriter, save_tree, shared_token

__all__ = [
    "BEGUN", "CHUNK_BYTES", "FORMAT", "TREE", "VERSION", "Keys", "LeafReader", "Piece", "Placement", "TreeInfo", "TreeLeaf", "TreeWriter", "as_array",
    "as_like", "chunk_shape", "describe", "dtype_of", "is_complete", "is_host_leaf", "named_leaves", "on_host", "own_view", "place", "read_tree",
    "restore_tree", "save_tree", "shared_token", "verify_tree",
]  # fmt: skip
