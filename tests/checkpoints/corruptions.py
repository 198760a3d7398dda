"""Single corruptions of a folder of weights, each by a kind and a seed: what disks, interrupted copies and hands do to files.

`SOURCE` are those of a Hugging Face folder, `CONVERTED` those of a converted one. Each changes the folder in place and says in a few words what it
did; which file, which byte or which field is drawn from the seed. Nothing here judges what should come of it.
"""

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

INDEX = "model.safetensors.index.json"


def damage(kinds: dict[str, Callable[[Path, random.Random], str]], kind: str, folder: Path, seed: int) -> str:
    """Corrupts a folder once; gives what was done."""
    return f"{kind}, seed {seed}: {kinds[kind](folder, random.Random(f'{kind} {seed}'))}"


# --- any file ---------------------------------------------------------------------------------------------------------


def flip(path: Path, rng: random.Random, start: int = 0, stop: int | None = None) -> str:
    raw = bytearray(path.read_bytes())
    at, bit = rng.randrange(start, len(raw) if stop is None else stop), rng.randrange(8)
    raw[at] ^= 1 << bit
    path.write_bytes(raw)
    return f"bit {bit} of byte {at} of {path.name}"


def cut(path: Path, length: int) -> str:
    os.truncate(path, length)
    return f"{path.name} cut to {length} bytes"


def cut_anywhere(path: Path, rng: random.Random) -> str:
    return cut(path, rng.randrange(path.stat().st_size))


def extend(path: Path, rng: random.Random) -> str:
    more = rng.randbytes(rng.choice((1, 4, 64, 4096)))
    path.write_bytes(path.read_bytes() + more)
    return f"{len(more)} bytes after the end of {path.name}"


def zero_block(path: Path, rng: random.Random) -> str:
    """As a disk does that lost a block."""
    raw = bytearray(path.read_bytes())
    at = rng.randrange(len(raw))
    stop = min(len(raw), at + rng.choice((16, 512)))
    raw[at:stop] = bytes(stop - at)
    path.write_bytes(raw)
    return f"bytes {at} to {stop} of {path.name} are zero"


def remove(path: Path) -> str:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"{path.name} removed"


def make_folder(path: Path) -> str:
    remove(path)
    path.mkdir()
    return f"{path.name} is a folder"


def make_pipe(path: Path) -> str:
    remove(path)
    os.mkfifo(path)
    return f"{path.name} is a pipe"


def make_dangling(path: Path) -> str:
    remove(path)
    path.symlink_to("nowhere")
    return f"{path.name} is a link to nowhere"


def swap(one: Path, other: Path) -> str:
    middle = one.with_name("between")
    one.rename(middle)
    other.rename(one)
    middle.rename(other)
    return f"{one.parent.name}/{one.name} and {other.parent.name}/{other.name} swapped"


def edit_json(path: Path, rng: random.Random) -> str:
    """Changes, removes or doubles one value, anywhere in it."""
    data = json.loads(path.read_bytes())
    where = _change(data, rng)
    path.write_text(json.dumps(data))
    return f"{path.name}: {where}"


def _change(data, rng: random.Random) -> str:
    """Changes one value below `data`, a list or dict that isn't empty; gives where and to what."""
    key = rng.choice(list(data) if isinstance(data, dict) else range(len(data)))
    if isinstance(data[key], (dict, list)) and data[key] and rng.random() < 0.9:
        return f"{key}.{_change(data[key], rng)}"
    if rng.random() < 0.2:
        del data[key]
        return f"{key} removed"
    data[key] = rng.choice([other for other in _others(data[key]) if json.dumps(other) != json.dumps(data[key])])
    return f"{key} is {str(data[key])[:40]}"


def _others(value) -> list:
    """Values that could stand in a value's place."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int):
        return [value + 1, value - 1, -value - 1, value * 2 + 1, 2**62, 2**70, float(value) + 0.5, str(value), None, [value]]
    if isinstance(value, float):
        return [value * 2 + 1, -value - 1.0, 10**400, str(value), None]
    if isinstance(value, str):
        return [value + "x", value[:-1] + "~", "", "../" + value, value.upper() + "\n", 7, None, [value]]
    if isinstance(value, list):
        return [[*value, *value, 1], None, {}, "x", 3]
    return [None, [], 3, "x", {"x": 1}]


def double_key(path: Path, rng: random.Random) -> str:
    """The first object gets one of its keys a second time, with another value."""
    data = json.loads(path.read_bytes())
    key = rng.choice(list(data))
    pair = f"{json.dumps(key)}: {json.dumps(rng.choice(_others(data[key])))}, "
    text = json.dumps(data)
    path.write_text("{" + pair + text[1:] if rng.random() < 0.5 else text[:-1] + ", " + pair[:-2] + "}")
    return f"{path.name} has {key} twice"


# --- safetensors ------------------------------------------------------------------------------------------------------


def _file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _on_file(change: Callable[[Path, random.Random], str]) -> Callable[[Path, random.Random], str]:
    return lambda folder, rng: change(_file(folder, rng), rng)


def _parts(path: Path) -> tuple[dict, bytes]:
    """Header and data of a file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _write(path: Path, header: dict | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _flip_part(part: str) -> Callable[[Path, random.Random], str]:
    def change(path: Path, rng: random.Random) -> str:
        end = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        return flip(path, rng, *{"length": (0, 8), "header": (8, end), "data": (end, None)}[part])

    return _on_file(change)


def _on_header(change: Callable[[dict, str, random.Random], str]) -> Callable[[Path, random.Random], str]:
    """Changes the header by what is done to one tensor's entry; the data stay."""

    def run(path: Path, rng: random.Random) -> str:
        header, data = _parts(path)
        name = rng.choice([key for key in header if key != "__metadata__"])
        what = change(header, name, rng)
        _write(path, header, data)
        return f"{path.name}: {name}: {what}"

    return _on_file(run)


def _shift_offsets(header: dict, name: str, rng: random.Random) -> str:
    by, ends = rng.choice((-4, -2, -1, 1, 2, 4, 1024)), rng.choice(((0,), (1,), (0, 1)))
    for end in ends:
        header[name]["data_offsets"][end] += by
    return f"offsets {header[name]['data_offsets']}"


def _odd_offsets(header: dict, name: str, rng: random.Random) -> str:
    start, stop = header[name]["data_offsets"]
    odd = [[stop, start], [start], [start, stop, stop], [start, 2**62], [2**63, 2**63 + stop - start], [str(start), stop], [float(start), stop]]
    odd += [None, {}, "12"]
    header[name]["data_offsets"] = rng.choice(odd)
    return f"offsets {header[name]['data_offsets']}"


def _other(header: dict, name: str, rng: random.Random, alike: bool = False) -> str:
    """Another tensor, of the same size where asked for and where there is one."""
    others = [key for key in header if key not in (name, "__metadata__")]
    same = [key for key in others if header[key]["shape"] == header[name]["shape"]] if alike else others
    return rng.choice(same or others)


def _swap_offsets(header: dict, name: str, rng: random.Random) -> str:
    one, two = header[name], header[_other(header, name, rng, alike=True)]
    one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
    return "offsets swapped with another tensor's"


def _overlap(header: dict, name: str, rng: random.Random) -> str:
    header[name]["data_offsets"] = header[_other(header, name, rng, alike=True)]["data_offsets"]
    return "offsets are another tensor's"


def _swap_names(header: dict, name: str, rng: random.Random) -> str:
    other = _other(header, name, rng, alike=True)
    header[name], header[other] = header[other], header[name]
    return f"swapped with {other}"


def _rename(header: dict, name: str, rng: random.Random) -> str:
    new = rng.choice((name + "x", name[1:], "", "a\nb", "\ud800", "x" * 5000, "../" + name))
    header[new] = header.pop(name)
    return f"renamed {new[:40]!r}"


def _forget(header: dict, name: str, rng: random.Random) -> str:
    del header[name]
    return "not listed"


def _absurd_shape(header: dict, name: str, rng: random.Random) -> str:
    shape = header[name]["shape"]
    count = math.prod(shape)
    absurd = [[2**62, 4], [2**32, 2**32, 0], [2**64], [10**300], [-1, -count], [count, 1, -1], [float(count)], [True] * len(shape), [shape]]
    absurd += ["12", {}, None, [1] * 100_000 + shape, [2**40] * 1000, [*shape, 0], [str(n) for n in shape], [2**31, 2**31]]
    header[name]["shape"] = rng.choice(absurd)
    return f"shape {str(header[name]['shape'])[:60]}"


def _other_shape(header: dict, name: str, rng: random.Random) -> str:
    shape = header[name]["shape"]
    others = [[math.prod(shape)], [1, *shape], [*shape[:-1], shape[-1] + 1], shape[::-1], shape[1:]]
    header[name]["shape"] = rng.choice([other for other in others if other != shape])
    return f"shape {shape} is {header[name]['shape']}"


def _other_dtype(header: dict, name: str, rng: random.Random) -> str:
    dtypes = ["F32", "F16", "BF16", "I32", "U16", "I16", "F8_E4M3", "F8_E5M2", "U8", "I8", "F4", "F64", "f32", "F31", "", None, 3]
    header[name]["dtype"] = rng.choice([dtype for dtype in dtypes if dtype != header[name]["dtype"]])
    return f"dtype {header[name]['dtype']}"


def _entry(header: dict, name: str, rng: random.Random) -> str:
    entry = header[name]
    if rng.random() < 0.5:
        del entry[rng.choice(sorted(entry))]
    else:
        header[name] = rng.choice((None, [], 3, "x", [entry["dtype"], entry["shape"], entry["data_offsets"]]))
    return f"entry {str(header[name])[:60]}"


def _metadata(header: dict, name: str, rng: random.Random) -> str:
    header["__metadata__"] = rng.choice(([], [1], 3, "pt", {"a": 1}, {"a": None}, {"a": {}}, True, header[name]))
    return f"__metadata__ {str(header['__metadata__'])[:60]}"


def _hole(path: Path, rng: random.Random) -> str:
    """Bytes that belong to no tensor, amid the others."""
    header, data = _parts(path)
    cuts = sorted({entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"})
    at, gap = rng.choice(cuts), rng.choice((1, 4, 64))
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= at:
            entry["data_offsets"] = [n + gap for n in entry["data_offsets"]]
    _write(path, header, data[:at] + bytes(gap) + data[at:])
    return f"{path.name}: a hole of {gap} bytes at {at}"


def _duplicate(equal: bool) -> Callable[[Path, random.Random], str]:
    def change(path: Path, rng: random.Random) -> str:
        header, data = _parts(path)
        name = rng.choice([key for key in header if key != "__metadata__"])
        entry = header[name] if equal else header[_other(header, name, rng, alike=True)]
        text, pair = json.dumps(header), f"{json.dumps(name)}: {json.dumps(entry)}"
        _write(path, "{" + pair + ", " + text[1:] if rng.random() < 0.5 else text[:-1] + ", " + pair + "}", data)
        return f"{path.name} lists {name} twice"

    return _on_file(change)


def _duplicate_field(path: Path, rng: random.Random) -> str:
    header, data = _parts(path)
    name = rng.choice([key for key in header if key != "__metadata__"])
    pair = rng.choice(('"dtype": "I32"', '"shape": [1]', '"data_offsets": [0, 4]', f'"shape": {header[name]["shape"]}'))
    entry = json.dumps(header[name])
    _write(path, json.dumps(header).replace(entry, "{" + pair + ", " + entry[1:], 1), data)
    return f"{path.name}: {name} has {pair} as well"


def _odd_text(path: Path, rng: random.Random) -> str:
    """A header that isn't quite the JSON it should be."""
    header, data = _parts(path)
    text = json.dumps(header)
    depth = rng.choice((50, 5000, 200_000))
    odd = {
        "begins with a space": " " + text,
        "ends with zeros": text + "\0" * 8,
        "ends with more": text + "{}",
        "is empty": "",
        "is a list": "[]",
        "says nothing": "{}",
        "has NaN": text[:-1] + ', "__metadata__": {"a": NaN}}',
        "has Infinity": text[:-1] + ', "x": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 0]}}',
        f"is {depth} deep": text[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}",
        f"has an entry {depth} deep": text[:-1] + ', "x": ' + '{"a": ' * depth + "1" + "}" * depth + "}",
        "has a long number": text[:-1] + ', "x": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 0]}}',
        "lacks its end": text[:-1],
    }
    what = rng.choice(sorted(odd))
    _write(path, odd[what], data)
    return f"{path.name}: the header {what}"


def _odd_bytes(path: Path, rng: random.Random) -> str:
    header, data = _parts(path)
    text = json.dumps(header).encode()
    bad = text.replace(b"model", rng.choice((b"mod\xffl", b"m\xed\xa0\x80", b"\xc0\x80")), 1)
    odd = rng.choice((bad, b"\xef\xbb\xbf" + text, text.decode().encode("utf-16-le")))
    path.write_bytes(len(odd).to_bytes(8, "little") + odd + data)
    return f"{path.name}: the header is not UTF-8"


def _odd_length(path: Path, rng: random.Random) -> str:
    raw = path.read_bytes()
    there = int.from_bytes(raw[:8], "little")
    length = rng.choice((0, 1, there - 1, there + 1, there + 8, len(raw) - 8, len(raw), 99_999_999, 100_000_001, 2**31, 2**63, 2**64 - 1))
    path.write_bytes(length.to_bytes(8, "little") + raw[8:])
    return f"{path.name}: header length {length}"


def _swap_shards(folder: Path, rng: random.Random) -> str:
    return swap(*rng.sample(sorted(folder.glob("*.safetensors")), 2))


def _copy_shard(folder: Path, rng: random.Random) -> str:
    one, other = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    shutil.copyfile(one, other)
    return f"{other.name} is a copy of {one.name}"


def _on_index(change: Callable[[dict, str, random.Random], str]) -> Callable[[Path, random.Random], str]:
    def run(folder: Path, rng: random.Random) -> str:
        path = folder / INDEX
        data = json.loads(path.read_bytes())
        name = rng.choice(sorted(data["weight_map"]))
        what = change(data["weight_map"], name, rng)
        path.write_text(json.dumps(data))
        return f"{INDEX}: {name}: {what}"

    return run


def _index_forgets(index: dict, name: str, rng: random.Random) -> str:
    del index[name]
    return "not listed"


def _index_errs(index: dict, name: str, rng: random.Random) -> str:
    index[name] = rng.choice(sorted(set(index.values()) - {index[name]}))
    return f"in {index[name]}"


def _index_leaves(index: dict, name: str, rng: random.Random) -> str:
    away = [f"../{index[name]}", f"/tmp/{index[name]}", f"./{index[name]}", "..", ".", "", "a\0b", "a\nb", "\udcff", "x" * 300, "none.safetensors"]
    index[name] = rng.choice([*away, None, 3, [index[name]], {}])
    return f"in {str(index[name])!r:.60}"


def _index_adds(index: dict, name: str, rng: random.Random) -> str:
    index[name + "x"] = index[name]
    return f"{name}x is listed as well"


def _index_twice(folder: Path, rng: random.Random) -> str:
    text = (folder / INDEX).read_text()
    index = json.loads(text)["weight_map"]
    name, file = rng.choice(sorted(index)), rng.choice(sorted(set(index.values())))
    (folder / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {' + f"{json.dumps(name)}: {json.dumps(file)}, "))
    return f"{INDEX} lists {name} twice"


OF_SHARDS = {
    "shards swapped": _swap_shards,
    "shard copied": _copy_shard,
    "index flipped": lambda folder, rng: flip(folder / INDEX, rng),
    "index truncated": lambda folder, rng: cut_anywhere(folder / INDEX, rng),
    "index emptied": lambda folder, rng: cut(folder / INDEX, 0),
    "index missing": lambda folder, rng: remove(folder / INDEX),
    "index a folder": lambda folder, rng: make_folder(folder / INDEX),
    "index a pipe": lambda folder, rng: make_pipe(folder / INDEX),
    "index edited": lambda folder, rng: edit_json(folder / INDEX, rng),
    "index lacks one": _on_index(_index_forgets),
    "index names another file": _on_index(_index_errs),
    "index names no file": _on_index(_index_leaves),
    "index has one more": _on_index(_index_adds),
    "index has one twice": _index_twice,
}
"""Of folders with an index."""

SOURCE = {
    "truncated": _on_file(cut_anywhere),
    "truncated in the header": _on_file(lambda path, rng: cut(path, rng.randrange(200))),
    "emptied": _on_file(lambda path, rng: cut(path, 0)),
    "one byte short": _on_file(lambda path, rng: cut(path, path.stat().st_size - 1)),
    "bytes added": _on_file(extend),
    "a block of zeros": _on_file(zero_block),
    "length flipped": _flip_part("length"),
    "header flipped": _flip_part("header"),
    "header flipped again": _flip_part("header"),
    "data flipped": _flip_part("data"),
    "another length": _on_file(_odd_length),
    "offsets shifted": _on_header(_shift_offsets),
    "odd offsets": _on_header(_odd_offsets),
    "offsets swapped": _on_header(_swap_offsets),
    "overlap": _on_header(_overlap),
    "hole": _on_file(_hole),
    "listed twice, equal": _duplicate(True),
    "listed twice, different": _duplicate(False),
    "a field twice": _on_file(_duplicate_field),
    "absurd shape": _on_header(_absurd_shape),
    "another shape": _on_header(_other_shape),
    "another dtype": _on_header(_other_dtype),
    "names swapped": _on_header(_swap_names),
    "renamed": _on_header(_rename),
    "not listed": _on_header(_forget),
    "odd entry": _on_header(_entry),
    "odd metadata": _on_header(_metadata),
    "odd text": _on_file(_odd_text),
    "odd bytes": _on_file(_odd_bytes),
    "missing": _on_file(lambda path, rng: remove(path)),
    "a folder": _on_file(lambda path, rng: make_folder(path)),
    "a pipe": _on_file(lambda path, rng: make_pipe(path)),
    "a link to nowhere": _on_file(lambda path, rng: make_dangling(path)),
    "config flipped": lambda folder, rng: flip(folder / "config.json", rng),
    "config edited": lambda folder, rng: edit_json(folder / "config.json", rng),
    "config truncated": lambda folder, rng: cut_anywhere(folder / "config.json", rng),
    **OF_SHARDS,
}

# --- converted folders ------------------------------------------------------------------------------------------------


def _leaf(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path.parent for path in folder.glob("*/zarr.json")))


def _chunk(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in _leaf(folder, rng).iterdir() if path.name != "zarr.json"))


def _on_chunk(change: Callable[[Path, random.Random], str]) -> Callable[[Path, random.Random], str]:
    def run(folder: Path, rng: random.Random) -> str:
        path = _chunk(folder, rng)
        return f"{path.parent.name}: {change(path, rng)}"

    return run


def _on_zarr(change: Callable[[Path, random.Random], str]) -> Callable[[Path, random.Random], str]:
    def run(folder: Path, rng: random.Random) -> str:
        leaf = _leaf(folder, rng)
        return f"{leaf.name}: {change(leaf / 'zarr.json', rng)}"

    return run


def _alike(folder: Path, path: Path, rng: random.Random, same_leaf: bool) -> Path:
    """Another chunk of the same size."""
    chunks = [p for p in folder.glob("*/*") if p.name != "zarr.json" and p != path and p.is_file() and p.stat().st_size == path.stat().st_size]
    return rng.choice(sorted(p for p in chunks if (p.parent == path.parent) == same_leaf) or sorted(chunks))


def _swap_chunks(same_leaf: bool) -> Callable[[Path, random.Random], str]:
    def run(folder: Path, rng: random.Random) -> str:
        path = rng.choice(sorted(folder.glob("experts.*/*.*.*"))) if same_leaf else _chunk(folder, rng)
        return swap(path, _alike(folder, path, rng, same_leaf))

    return run


def _copy_chunk(folder: Path, rng: random.Random) -> str:
    path = _chunk(folder, rng)
    other = _alike(folder, path, rng, rng.random() < 0.5)
    shutil.copyfile(other, path)
    return f"{path.parent.name}/{path.name} is a copy of {other.parent.name}/{other.name}"


def _add_chunk(folder: Path, rng: random.Random) -> str:
    path = _chunk(folder, rng)
    extra = path.with_name(rng.choice((path.name + ".0", "9." + path.name.split(".", 1)[-1], "c", "0.0.0.tmp", ".hidden")))
    extra.write_bytes(path.read_bytes())
    return f"{path.parent.name}/{extra.name} added"


def _zarr_field(path: Path, rng: random.Random) -> str:
    data = json.loads(path.read_bytes())
    shape, chunk = data["shape"], data["chunk_grid"]["configuration"]["chunk_shape"]
    kinds = {"uint16": ["int16", "bfloat16", "float16", "uint8"], "float32": ["int32", "uint32", "float64"], "int8": ["uint8", "int4", "bool"]}
    transposed = [{"name": "transpose", "configuration": {"order": list(range(len(shape)))[::-1]}}, *data["codecs"]]
    edits = {
        "without codecs": {"codecs": []},
        "without a checksum": {"codecs": data["codecs"][:1]},
        "with big endian": {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, *data["codecs"][1:]]},
        "with a compressor": {"codecs": [*data["codecs"], {"name": "gzip", "configuration": {"level": 1}}]},
        "with a transposition": {"codecs": transposed},
        "with another fill value": {"fill_value": 1},
        "with another dtype": {"data_type": rng.choice(kinds.get(data["data_type"], ["uint64"]))},
        "with longer chunks": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2 * n for n in chunk]}}},
        "with chunks turned": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk[::-1]}}},
        "with a grown shape": {"shape": [shape[0] + 1, *shape[1:]]},
        "with a cut shape": {"shape": [*shape[:-1], shape[-1] - 1]},
        "with a turned shape": {"shape": shape[::-1]},
        "with a huge shape": {"shape": [2**40] * len(shape)},
        "with slashes": {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "/"}}},
        "with default keys": {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
        "with another format": {"zarr_format": 2},
        "with another node": {"node_type": "group"},
        "with dimension names": {"dimension_names": ["x"] * len(shape)},
        "with attributes": {"attributes": {"scale": 2}},
        "with a field more": {"storage_transformers": [{"name": "x"}]},
    }
    what = rng.choice(sorted(edits))
    path.write_text(json.dumps({**data, **edits[what]}))
    return f"zarr.json {what}"


def _zarr_of_another(folder: Path, rng: random.Random) -> str:
    paths = sorted(folder.glob("*/zarr.json"))
    one = rng.choice(paths)
    other = rng.choice([path for path in paths if path.read_bytes() != one.read_bytes()])
    shutil.copyfile(other, one)
    return f"{one.parent.name} has the zarr.json of {other.parent.name}"


def _leaf_pair(folder: Path, rng: random.Random) -> tuple[Path, Path]:
    """Two leaves of one shape."""
    by_text: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*/zarr.json")):
        by_text.setdefault(json.dumps(json.loads(path.read_bytes())["shape"]), []).append(path.parent)
    one, other = rng.sample(rng.choice([same for same in by_text.values() if len(same) > 1]), 2)
    return one, other


def _swap_leaves(folder: Path, rng: random.Random) -> str:
    return swap(*_leaf_pair(folder, rng))


def _copy_leaf(folder: Path, rng: random.Random) -> str:
    one, other = _leaf_pair(folder, rng)
    shutil.rmtree(one)
    shutil.copytree(other, one)
    return f"{one.name} is a copy of {other.name}"


def _rename_leaf(folder: Path, rng: random.Random) -> str:
    leaf = _leaf(folder, rng)
    new = leaf.with_name(rng.choice((leaf.name + "x", leaf.name.upper(), leaf.name.replace(".", "/", 1).replace("/", "_"))))
    leaf.rename(new)
    return f"{leaf.name} renamed {new.name}"


def _leaf_is_file(folder: Path, rng: random.Random) -> str:
    leaf = _leaf(folder, rng)
    shutil.rmtree(leaf)
    leaf.write_bytes(b"x")
    return f"{leaf.name} is a file"


def _add_file(folder: Path, rng: random.Random) -> str:
    name = rng.choice(("extra.bin", ".DS_Store", "manifest.json.tmp", "_METADATA.bak", "params.extra"))
    (folder / name).write_bytes(rng.randbytes(100))
    return f"{name} added"


def _add_leaf(folder: Path, rng: random.Random) -> str:
    leaf = _leaf(folder, rng)
    shutil.copytree(leaf, folder / (leaf.name + ".more"))
    return f"{leaf.name}.more added"


def _kept(folder: Path, rng: random.Random) -> Path:
    return folder / rng.choice(("config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"))


def _at(name: str, change: Callable[[Path, random.Random], str]) -> Callable[[Path, random.Random], str]:
    return lambda folder, rng: change(folder / name, rng)


KEPT = {
    "kept file flipped": lambda folder, rng: flip(_kept(folder, rng), rng),
    "kept file truncated": lambda folder, rng: cut_anywhere(_kept(folder, rng), rng),
    "kept file emptied": lambda folder, rng: cut(_kept(folder, rng), 0),
    "kept file missing": lambda folder, rng: remove(_kept(folder, rng)),
    "kept file a folder": lambda folder, rng: make_folder(_kept(folder, rng)),
    "_METADATA flipped": _at("_METADATA", flip),
    "_METADATA edited": _at("_METADATA", edit_json),
    "_METADATA truncated": _at("_METADATA", cut_anywhere),
    "_METADATA missing": lambda folder, rng: remove(folder / "_METADATA"),
}
"""Of files that restoring doesn't read."""

CONVERTED = {
    "chunk flipped": _on_chunk(flip),
    "chunk flipped again": _on_chunk(flip),
    "chunk truncated": _on_chunk(cut_anywhere),
    "chunk one byte short": _on_chunk(lambda path, rng: cut(path, path.stat().st_size - 1)),
    "chunk emptied": _on_chunk(lambda path, rng: cut(path, 0)),
    "chunk missing": _on_chunk(lambda path, rng: remove(path)),
    "chunk extended": _on_chunk(extend),
    "chunk with a block of zeros": _on_chunk(zero_block),
    "chunk a folder": _on_chunk(lambda path, rng: make_folder(path)),
    "chunks of a leaf swapped": _swap_chunks(True),
    "chunks of two leaves swapped": _swap_chunks(False),
    "chunk copied": _copy_chunk,
    "chunk added": _add_chunk,
    "zarr.json flipped": _on_zarr(flip),
    "zarr.json truncated": _on_zarr(cut_anywhere),
    "zarr.json emptied": _on_zarr(lambda path, rng: cut(path, 0)),
    "zarr.json missing": _on_zarr(lambda path, rng: remove(path)),
    "zarr.json of another leaf": _zarr_of_another,
    "zarr.json field": _on_zarr(_zarr_field),
    "zarr.json field again": _on_zarr(_zarr_field),
    "zarr.json edited": _on_zarr(edit_json),
    "zarr.json with a key twice": _on_zarr(double_key),
    "manifest flipped": _at("manifest.json", flip),
    "manifest edited": _at("manifest.json", edit_json),
    "manifest with a key twice": _at("manifest.json", double_key),
    "manifest truncated": _at("manifest.json", cut_anywhere),
    "manifest missing": lambda folder, rng: remove(folder / "manifest.json"),
    "manifest a folder": lambda folder, rng: make_folder(folder / "manifest.json"),
    "spec flipped": _at("spec.json", flip),
    "spec edited": _at("spec.json", edit_json),
    "spec with a key twice": _at("spec.json", double_key),
    "spec truncated": _at("spec.json", cut_anywhere),
    "spec missing": lambda folder, rng: remove(folder / "spec.json"),
    "spec a folder": lambda folder, rng: make_folder(folder / "spec.json"),
    "leaf renamed": _rename_leaf,
    "leaf missing": lambda folder, rng: remove(_leaf(folder, rng)),
    "leaf a file": _leaf_is_file,
    "leaves swapped": _swap_leaves,
    "leaf copied": _copy_leaf,
    "leaf added": _add_leaf,
    "file added": _add_file,
    **KEPT,
}
