"""The model graph: Flax Linen modules used through `apply(params, ...)` only."""
