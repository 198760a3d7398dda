"""Tables and sentences on folders of weights: what is in one, what two differ in, how chunks were changed, what an export wrote.

It shows what `checkpoints.contents`, `diff` and `export` found, and opens nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoints import kinds
from checkpoints.contents import Contents
from checkpoints.diff import Diff, LeafDiff
from checkpoints.export import Exported
from checkpoints.kinds import LeafInfo

_LARGEST = 12
_BAR = 24


def size(nbytes: float) -> str:
    """Bytes in words: '1.23 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.3g} TB" if nbytes < 1000 else f"{nbytes:,.0f} TB"


def dims(shape: Sequence[int] | None) -> str:
    """A shape in words: '4x16'."""
    return "" if shape is None else "x".join(map(str, shape))


def table(left: str, *right: str) -> Table:
    """A table whose first column is text. Where there is no room, numbers wrap at blanks and nothing is cut off."""
    out = Table(box=None, pad_edge=False)
    out.add_column(left, no_wrap=True, overflow="fold")
    for name in right:
        out.add_column(name, justify="right", overflow="fold")
    return out


def numbers(values: Iterable[int]) -> str:
    """One number, or all there are."""
    return " or ".join(f"{value:,}" for value in values)


def some(names: Sequence[str], limit: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def progress(found: Contents) -> str:
    """How far an unfinished folder is."""
    if found.done is None:
        return ""
    done, total = found.done
    return f", {size(done)} of {size(total)} done ({done / total:.0%})" if total else f", {size(done)} done"


def about_table(found: Contents) -> Table:
    """What a folder says of itself."""
    out = Table(box=None, pad_edge=False, show_header=False)
    out.add_column(no_wrap=True)
    out.add_column()
    if found.model is not None:
        for name, text in model_rows(found.model):
            out.add_row(name, text)
    out.add_row("on disk", f"{size(found.nbytes)} in {found.files:,} files, {len(found.leaves):,} leaves")
    for name, value in found.about.items():
        if value not in (None, "", [], {}):
            out.add_row(name.replace("_", " "), words(value))
    if found.kept:
        out.add_row("kept files", ", ".join(found.kept))
    return out


def model_rows(model: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """What there is to say of a model."""
    heads = f", {model['extra_heads']} extra head(s)" if model["extra_heads"] else ""
    yield "model", f"{model['family']}, {model['layers']} layers, width {model['width']:,}, vocabulary {model['vocab']:,}{heads}"
    if model["moe_layers"]:
        yield "experts", f"{numbers(model['experts'])} in {model['moe_layers']} layers, {numbers(model['active_experts'])} active"
    yield "parameters", f"{model['parameters']:,}, {model['active_parameters']:,} active"
    yield "spec", model["spec_hash"]


def words(value: Any) -> str:
    """A value of `about` in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {size(inner) if key == 'nbytes' else words(inner)}" for key, inner in value.items()).replace("nbytes ", "")
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def kind_table(leaves: Sequence[LeafInfo], console: Console) -> Table:
    """A row per kind, with its share of the bytes as a bar."""
    out = table("kind", "leaves", "parameters", "bytes", "share")
    out.add_column("", no_wrap=True)
    mark = "█" if console.encoding.lower().startswith("utf") else "#"
    total = max(1, sum(leaf.nbytes for leaf in leaves))
    for share in kinds.shares(leaves):
        part = share.nbytes / total
        out.add_row(share.name, f"{share.leaves:,}", f"{share.parameters:,}", size(share.nbytes), f"{part:.1%}", mark * round(_BAR * part))
    out.add_row("total", f"{len(leaves):,}", f"{sum(leaf.parameters for leaf in leaves):,}", size(total), "", "")
    return out


def largest_table(leaves: Sequence[LeafInfo]) -> Table:
    """The largest leaves; those that differ in nothing but their layer are one row."""
    out = table("largest leaves", "number", "shape", "dtype", "chunk", "chunks each", "bytes each", "bytes")
    for share, one in kinds.alike(leaves)[:_LARGEST]:
        chunks = f"{one.files:,}" if one.files else ""
        each = size(share.nbytes / share.leaves)
        out.add_row(share.name, f"{share.leaves:,}", dims(one.shape), one.dtype, dims(one.chunk), chunks, each, size(share.nbytes))
    return out


def leaf_table(leaves: Sequence[LeafInfo]) -> Table:
    """A row per leaf."""
    out = table("leaf", "kind", "shape", "dtype", "chunk", "bytes")
    for leaf in leaves:
        out.add_row(leaf.path, leaf.kind, dims(leaf.shape), leaf.dtype, dims(leaf.chunk), f"{leaf.nbytes:,}")
    return out


def expert_lines(leaves: Sequence[LeafInfo]) -> Iterable[str]:
    """Bytes of the routed experts by layer; neighbours that have the same are one line."""
    layers = sorted(kinds.expert_layers(leaves).items())
    for nbytes, group in itertools.groupby(layers, key=lambda pair: pair[1]):
        of = [layer for layer, _ in group]
        where = f"layer {of[0]}" if len(of) == 1 else f"{len(of)} layers, {of[0]} to {of[-1]}, each"
        yield f"experts of {where}: {size(nbytes)}"


# --- two folders -----------------------------------------------------------------------------------------------------


def diff_tables(found: Diff, limit: int) -> Iterable[Table]:
    """Fields, leaves and kinds that differ."""
    if found.spec:
        out = table("field of the model", "A", "B")
        for name, a, b in found.spec[:limit]:
            out.add_row(name, str(a), str(b))
        yield more(out, len(found.spec) - limit)
    if found.leaves:
        out = table("leaf", "shape", "dtype", "numbers that differ", "experts", "largest |a-b|", "relative", "not finite")
        for one in sorted(found.leaves, key=lambda one: (one.shapes[0] == one.shapes[1], -one.max_abs))[:limit]:
            out.add_row(one.path, both(*map(dims, one.shapes)), both(*one.dtypes), *_counts(one))
        yield more(out, len(found.leaves) - limit)
        out = table("kind", "leaves", "that differ", "numbers", "that differ")
        for kind, counts in found.by_kind.items():
            out.add_row(kind, *(f"{count:,}" for count in counts))
        yield out


def _counts(one: LeafDiff) -> tuple[str, ...]:
    if one.shapes[0] != one.shapes[1]:
        return ()
    experts = f"{one.experts:,} of {one.shapes[0][0]:,}" if one.path.startswith("experts.") else ""
    gaps = (f"{one.max_abs:.3g}", f"{one.max_rel:.3g}") if one.differ else ("", "")
    return f"{one.differ:,} of {one.numbers:,}", experts, *gaps, f"{one.not_finite:,}" if one.not_finite else ""


def both(a: str, b: str) -> str:
    """Two words, or one if they are the same."""
    return a if a == b else f"{a} / {b}"


def more(out: Table, count: int) -> Table:
    """A table with a last row that says how many it leaves out."""
    if count > 0:
        out.add_row(f"and {count:,} more")
    return out


def chunk_table(before: Contents, after: Contents) -> Table:
    """Chunks of both, a row for leaves that differ in nothing but their layer."""
    out = table("leaf", "number", "shape", "chunk before", "after", "chunks each before", "after", "dtype")
    old = {leaf.path: leaf for leaf in before.leaves}
    for share, one in kinds.alike(after.leaves):
        was = old.get(one.path)
        chunks = (dims(was.chunk), dims(one.chunk), f"{was.files:,}" if was.files else "") if was else ("", dims(one.chunk), "")
        out.add_row(share.name, f"{share.leaves:,}", dims(one.shape), *chunks, f"{one.files:,}", both(was.dtype if was else one.dtype, one.dtype))
    return out


# --- exports ---------------------------------------------------------------------------------------------------------


def export_notes(found: Exported) -> Iterable[str]:
    """In what an export differs from its source."""
    notes = {
        "lost bits when they were converted, and have the source's dtype but not its numbers": found.rounded,
        "were rounded to the dtype that was asked for": found.narrowed,
        "come from quantized experts, and are what those stand for": found.dequantized,
        "were packed in the source, and are plain here": found.unpacked,
        "are copies of others, and were written again": found.copies,
        "of the source were passed over when it was converted, and are missing": found.missing,
    }
    for text, names in notes.items():
        if names:
            yield f"{len(names):,} tensors {text}: {some(names, 3)}"
