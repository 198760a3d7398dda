"""One of two processes that keep each other's arrays: `neighbour_process.py keep|restore PROCESS PORT MEMORY [ROOT]`.

`keep` also saves to ROOT, says "kept" and waits to be killed; `restore` says "restored GENERATION" where every bit of its part is there.
"""

import os
import sys
import time

import numpy as np


def values_of(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    shapes = {"sharded": ((16, 96), np.float32), "everywhere": ((24,), np.float32), "local": ((5,), np.int64)}
    return {name: rng.integers(-1000, 1000, shape).astype(dtype) for name, (shape, dtype) in shapes.items()}


def tree_of(step: int) -> dict:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh, values = jax.make_mesh((4,), ("x",)), values_of(step)
    for name, spec in (("sharded", PartitionSpec("x")), ("everywhere", PartitionSpec())):
        value = values[name]
        values[name] = jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index, value=value: value[index])
    return values


def keep(memory: str, root: str) -> None:
    from checkpoints.neighbour import NeighbourCopy
    from checkpoints.saver import AsyncSaver

    with AsyncSaver(root, companion=NeighbourCopy(memory, block_bytes=1 << 12)) as saver:
        for step in (6, 7):
            saver.save(step, tree_of(step))
    print("kept", flush=True)
    time.sleep(300)


def restore(memory: str) -> None:
    import jax

    from checkpoints.neighbour import NeighbourCopy

    wanted = tree_of(7)
    generation, tree = NeighbourCopy(memory, block_bytes=1 << 12).restore(wanted)
    np.testing.assert_array_equal(tree.pop("local"), wanted.pop("local"))
    for got, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
        for a, b in zip(got.addressable_shards, expected.addressable_shards, strict=True):
            np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))
    print(f"restored {generation}", flush=True)
    os._exit(0)  # without the distributed service's farewell, which can take seconds


if __name__ == "__main__":
    mode, process, port, *rest = sys.argv[1:]
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    {"keep": keep, "restore": restore}[mode](*rest)
