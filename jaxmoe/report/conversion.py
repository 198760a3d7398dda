"""Tables about conversions: what was written, and what a dry run found."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from checkpoints.dry_run import DryRun
from checkpoints.manifest import Manifest

_USUAL = ("used", "copy", "buffer")


def summary(manifest: Manifest) -> Table:
    """Leaves and bytes by kind."""
    table = _table("kind", "leaves", "dtype", "bytes")
    for kind in ("params", "experts"):
        records = [record for path, record in manifest.leaves.items() if path.startswith(f"{kind}.")]
        dtypes = ", ".join(sorted({record.dtype for record in records})) or manifest.dtype
        table.add_row(kind, str(len(records)), dtypes, f"{sum(record.nbytes for record in records):,}")
    table.add_row("total", str(len(manifest.leaves)), "", f"{manifest.nbytes:,}")
    return table


def listing(manifest: Manifest) -> Table:
    """A row per leaf."""
    table = _table("leaf", "shape", "dtype", "chunk", "bytes")
    for path, record in manifest.leaves.items():
        table.add_row(path, dims(record.shape), record.dtype, dims(record.chunk), f"{record.nbytes:,}")
    return table


def tensors_in(found: DryRun) -> Table:
    """A row per tensor of the source."""
    table = _table("tensor", "shape", "dtype", "bytes", "status", "becomes")
    for row in found.tensors:
        more = f" and {len(row.becomes) - 2} more" if len(row.becomes) > 2 else ""
        table.add_row(row.name, dims(row.shape), row.dtype, f"{row.nbytes:,}", row.status, ", ".join(row.becomes[:2]) + more)
    return table


def leaves_out(found: DryRun) -> Table:
    """A row per array of the output."""
    table = _table("leaf", "shape", "dtype", "chunk", "files", "bytes")
    for row in found.leaves:
        table.add_row(row.path, dims(row.shape), row.dtype, dims(row.chunk), f"{row.files:,}", f"{row.nbytes:,}")
    return table


def by_status(found: DryRun) -> Table:
    """Tensors and bytes of the source by what becomes of them."""
    table = _table("tensors", "count", "bytes")
    counts = Counter(row.status for row in found.tensors)
    for status in sorted(counts, key=lambda status: (status not in _USUAL, status)):
        nbytes = sum(row.nbytes for row in found.tensors if row.status == status)
        table.add_row(status, f"{counts[status]:,}", f"{nbytes:,}")
    return table


def print_dry_run(found: DryRun, console: Console) -> None:
    """Everything that a dry run found, problems last."""
    console.print(tensors_in(found))
    console.print()
    if found.leaves:
        console.print(leaves_out(found))
        console.print()
    console.print(by_status(found))
    if found.forecast is not None:
        f = found.forecast
        files = sum(row.files for row in found.leaves)
        say = [
            f"{found.spec.family}, names as {found.layout}: {found.bytes_in:,} bytes in, {f.nbytes:,} bytes out: "
            f"{len(found.leaves):,} leaves in {files:,} files",
            f"reading and arranging {f.read_rate / 1e6:,.0f} MB/s, writing {f.write_rate / 1e6:,.0f} MB/s here: about {_duration(f.seconds)}",
            f"disk: {f.needed:,} bytes are needed, {f.free:,} free",
        ]
        if f.done:
            say.append(f"an unfinished run has written {f.done:,} of them, which would be read again and kept")
        console.print("\n".join(say), soft_wrap=True, markup=False, highlight=False)
    if found.finished:
        console.print("the output folder holds this conversion already: nothing would be done", soft_wrap=True, markup=False)
    console.print("nothing was written", soft_wrap=True, markup=False)


def dims(shape: tuple[int, ...]) -> str:
    """A shape as '8x4096x14336'."""
    return "x".join(map(str, shape)) or "scalar"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    words = {"leaf", "tensor", "tensors", "kind", "status", "becomes"}
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right", no_wrap=name in ("leaf", "tensor", "shape", "dtype", "chunk", "bytes"))
    return table
