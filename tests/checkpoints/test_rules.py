"""Rules of every kind: a model made for the purpose goes through conversion and back, and single pieces against plain loops."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints import families, plan, store, units
from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from checkpoints.export import export_hf
from checkpoints.families import Rule, hf_tensors, leaf_paths, pieces_of
from checkpoints.families.rules import _piece
from checkpoints.load import open_checkpoint
from checkpoints.quantized import Unpacked
from tests.checkpoints import hf_folders, odd_model
from tests.checkpoints.conftest import held

PREFIXES = {"none": (), "before": (("", "language_model."),), "within": (("model.", "model.language_model."),)}
CASES = [(form, "none") for form in odd_model.EXPERTS] + [("single", "before"), ("stacked", "within")]


def renamed(tensors, prefixes):
    layout = odd_model.layout(prefixes=PREFIXES[prefixes])
    return {layout.on_disk(name): value for name, value in tensors.items()}


@pytest.fixture
def use(monkeypatch):
    """Makes the odd model the one that every config.json is of."""

    def start(*layouts):
        monkeypatch.setitem(families.LAYOUTS, "odd", layouts)
        monkeypatch.setattr(plan, "read_config", lambda hf: odd_model.SPEC.with_precision("float32"))

    return start


def bits(x):
    x = held(np.asarray(x))
    return x.dtype, x.shape, x.tobytes()


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert bits(got[name]) == bits(value), name


@pytest.mark.parametrize(("dtype", "small"), [("bfloat16", True), ("float32", False)], ids=["small_blocks", "float32"])
@pytest.mark.parametrize(("form", "prefixes"), CASES)
def test_there_and_back(tmp_path, monkeypatch, use, form, prefixes, dtype, small):
    use(odd_model.layout(form, PREFIXES[prefixes]))
    if small:
        monkeypatch.setattr(store, "CHUNK_BYTES", 300)
        monkeypatch.setattr(units, "BLOCK_BYTES", 700)
    leaves = odd_model.random_leaves(dtype)
    tensors = renamed(odd_model.tensors(leaves, form), prefixes)
    manifest = convert(hf_folders.write_folder(tmp_path / "hf", {}, tensors, shards=2), tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    got = {path: checkpoint.read(path) for path in manifest.leaves}
    assert_same(got, {path: held(leaf) for path, leaf in leaves.items()})
    assert manifest.dtype == dtype and manifest.dropped == (0, 0)
    checkpoint.verify()
    export_hf(checkpoint.spec, got, {}, tmp_path / "back", dtype)
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors)


@pytest.mark.parametrize("form", ["interleaved", "transposed_stacked"])
def test_blocks_bound_what_is_read_at_once(tmp_path, monkeypatch, use, form):
    use(odd_model.layout(form))
    most, read = 1000, []
    monkeypatch.setattr(units, "BLOCK_BYTES", most)
    real = Unpacked.read_matrix

    def read_matrix(self, name, width, start, stop, at=slice(None)):
        read.append((stop - start, 4 * width))
        return real(self, name, width, start, stop, at)

    monkeypatch.setattr(Unpacked, "read_matrix", read_matrix)
    monkeypatch.setattr(Unpacked, "holds", lambda *_: False)  # what needs nothing done to it is read as it is asked for
    convert(hf_folders.write_folder(tmp_path / "hf", {}, odd_model.tensors(odd_model.random_leaves(), form)), tmp_path / "out")
    assert max(rows for rows, _ in read) > 5
    assert all(rows <= max(1, most // width) for rows, width in read)


@pytest.mark.parametrize("form", odd_model.EXPERTS)
def test_every_element_belongs_to_one_leaf(form, use):
    layout = odd_model.layout(form)
    expected = odd_model.tensors(odd_model.random_leaves(), form)
    found = hf_tensors(odd_model.SPEC, layout)
    assert {name: shape for name, (shape, _) in found.items()} == {name: value.shape for name, value in expected.items()}
    for name, (shape, parts) in found.items():
        seen = np.zeros(shape, int)
        for _, piece in parts:
            piece.view(seen)[...] += 1
        assert (seen == 1).all(), name


# --- leaves of their own dtype ----------------------------------------------------------------------------------------


def test_pinned_leaves_stay_float32(tmp_path, use):
    use(odd_model.layout())
    leaves = odd_model.random_leaves("bfloat16")
    tensors = odd_model.tensors(leaves)
    manifest = convert(hf_folders.write_folder(tmp_path / "hf", {}, tensors), tmp_path / "out")
    assert {path for path, record in manifest.leaves.items() if (record.dtype, record.stored) == ("float32", "float32")} == odd_model.PINNED
    assert {record.dtype for path, record in manifest.leaves.items() if path not in odd_model.PINNED} == {"bfloat16"}
    checkpoint = open_checkpoint(tmp_path / "out")
    for dtype, kind in (("bfloat16", np.uint16), ("float32", np.float32), (None, np.uint16)):
        params = families.flatten(checkpoint.restore_params(dtype=dtype))
        for path, value in params.items():
            assert value.dtype == (np.float32 if f"params.{path}" in odd_model.PINNED else kind), path
        path = "params.layers.0.router.select_bias"
        np.testing.assert_array_equal(params[path.removeprefix("params.")], leaves[path])
    assert checkpoint.read(path, dtype="bfloat16").dtype == np.uint16
    exported = export_hf(checkpoint.spec, {path: checkpoint.read(path) for path in manifest.leaves}, {}, tmp_path / "back", "bfloat16")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert exported and back["model.layers.2.mlp.gate.weight"].dtype == np.float32 and back["lm_head.weight"].dtype == ml_dtypes.bfloat16


def test_pinned_tensors_in_the_models_own_dtype(tmp_path, use):
    """Stored in bfloat16, they are widened; the number of dtypes on disk decides nothing."""
    use(odd_model.layout())
    leaves = odd_model.random_leaves("bfloat16")
    narrow = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in leaves.items()}
    manifest = convert(hf_folders.write_folder(tmp_path / "hf", {}, odd_model.tensors(narrow)), tmp_path / "out")
    path = "params.layers.2.router.kernel"
    assert manifest.dtype == "bfloat16" and manifest.leaves[path].dtype == "float32"
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "out").read(path), narrow[path].astype(np.float32))


# --- what may be missing or left over -------------------------------------------------------------------------------


def test_folder_without_its_extra_heads(tmp_path, use):
    use(odd_model.layout())
    leaves = odd_model.random_leaves()
    tensors = odd_model.tensors(leaves)
    own = {name: value for name, value in tensors.items() if not name.startswith(("heads.", "model.layers.3."))}
    manifest = convert(hf_folders.write_folder(tmp_path / "hf", {}, own), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").spec == dataclasses.replace(odd_model.SPEC, extra_heads=())
    assert not any(path.startswith(("params.extra.", "experts.3.")) for path in manifest.leaves)
    own["heads.0.enorm.weight"] = tensors["heads.0.enorm.weight"]
    with pytest.raises(CheckpointError, match="tensors are missing that the config needs: heads.0.hnorm.weight, heads.0.join.weight"):
        convert(hf_folders.write_folder(tmp_path / "part", {}, own), tmp_path / "other")


def test_what_is_passed_over_is_counted(tmp_path, use):
    use(odd_model.layout())
    tensors = odd_model.tensors(odd_model.random_leaves())
    lost = {"vision.a": np.zeros((3, 4), np.float32), "vision.b.weight": np.zeros(5, np.int8), "model.layers.3.embed.weight": np.zeros(2, np.float16)}
    buffer = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.zeros(7, np.float32)}
    manifest = convert(hf_folders.write_folder(tmp_path / "hf", {}, {**tensors, **lost, **buffer}), tmp_path / "out")
    assert set(manifest.ignored) == {*lost, *buffer}
    assert manifest.dropped == (3, 48 + 5 + 4)
    assert open_checkpoint(tmp_path / "out").manifest == manifest
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["dropped"] == [3, 57]


def test_everything_that_is_wrong_is_in_one_error(tmp_path, use):
    use(odd_model.layout())
    tensors = odd_model.tensors(odd_model.random_leaves())
    del tensors["lm_head.weight"]
    tensors |= {"model.layers.2.embed.weight": np.zeros(2, np.float32), "odd": np.zeros(2, np.float32)}
    tensors["model.norm.weight"] = np.zeros(D := odd_model.D + 1, np.int8)
    tensors["model.layers.0.mlp.correction"] = np.zeros((odd_model.E,), np.float32)
    with pytest.raises(CheckpointError) as caught:
        convert(hf_folders.write_folder(tmp_path / "hf", {}, tensors), tmp_path / "out")
    text = str(caught.value)
    assert "\n" not in text and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    for part in (
        "1 tensor is missing that the config needs: lm_head.weight;",
        "2 tensors are unexpected, which the config has no place for: model.layers.2.embed.weight, odd;",
        "tensor model.layers.0.mlp.correction has shape [3], the config needs [1, 3]",
        f"tensor model.norm.weight has shape [{D}], the config needs [{D - 1}];",
        "tensor model.norm.weight has dtype I8, which is not supported",
    ):
        assert part in text


def test_many_of_a_kind_are_cut_short(tmp_path, use):
    use(odd_model.layout())
    tensors = {name: value.reshape(1, *value.shape) for name, value in odd_model.tensors(odd_model.random_leaves()).items()}
    with pytest.raises(CheckpointError, match=r" and \d+ more$") as caught:
        convert(hf_folders.write_folder(tmp_path / "hf", {}, tensors), tmp_path / "out")
    assert str(caught.value).count(" has shape ") == 20


# --- single pieces ----------------------------------------------------------------------------------------------------


def arrangements():
    """Rule, leaf shape: every combination of rows, columns and copies with what they take."""
    takes = ({}, {"part": (1, 3)}, {"rows": (1, 2, 2)}, {"rows": (2, 5, 7)}, {"rows": (0, 6, 6)})
    for take in takes:
        yield Rule("t", in_axes=1, **take), (4, 3, 2)
        yield Rule("t", in_axes=2, **take), (4, 3, 6)
        yield Rule("t", in_axes=1, transposed=True, **take), (4, 6)
        yield Rule("t", in_axes=2, transposed=True, **take), (2, 3, 6)
        yield Rule("t", **take), (2, 3)
        yield Rule("t", matrix=1, **take), (6, 4)
        yield Rule("t", matrix=2, unit_axis=1, **take), (2, 3, 4)
        yield Rule("t", matrix=2, order=(1, 0, 2), **take), (3, 2, 4)


def element(rule, piece, row, col, expert):
    """Where the piece's element (row, col) lies in the flat tensor, by the definition."""
    start, stop, period = piece.take
    where = col if rule.transposed else row
    moved = where // (stop - start) * period + start + where % (stop - start)
    row, col = (row, moved) if rule.transposed else (moved, col)
    return (expert * piece.height + row) * piece.width + col


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("rule", "shape"), list(arrangements()))
def test_a_piece_against_loops(rule, shape, stacked):
    rule = dataclasses.replace(rule, experts=stacked)
    piece = _piece(rule, "t", shape, None, 1 if stacked else None, 3)
    tensor = np.arange(np.prod(piece.hf_shape)).reshape(piece.hf_shape)
    flat = tensor.reshape(-1)
    expected = np.array([[flat[element(rule, piece, r, c, int(stacked))] for c in range(piece.cols)] for r in range(piece.rows)])
    np.testing.assert_array_equal(piece.view(tensor).reshape(piece.rows, piece.cols), expected)
    leaf = piece.to_leaf(expected)
    assert leaf.shape == shape and piece.rows * piece.cols == leaf.size
    np.testing.assert_array_equal(piece.to_hf(leaf), expected)
    if rule.in_axes and not rule.transposed:
        np.testing.assert_array_equal(leaf, expected.T.reshape(shape))
    elif rule.order is None:
        np.testing.assert_array_equal(leaf, expected.reshape(shape))
    else:
        np.testing.assert_array_equal(leaf, expected.reshape([shape[a] for a in rule.order]).swapaxes(0, 1))
    matrix = tensor.reshape(-1, piece.width)
    for most in (1, 2, 5, 7, 100):
        for start, stop in ((0, piece.rows), (1, piece.rows - 1)):
            blocks = list(piece.blocks(start, stop, most))
            assert all(block.stop - block.first <= max(most, 1) or block.rows.stop - block.rows.start <= most for block in blocks)
            got = np.concatenate([piece.take_columns(matrix[block.first : block.stop][block.at]) for block in blocks])
            np.testing.assert_array_equal(got, expected[start:stop])
            assert [block.rows.start for block in blocks] == [start, *(block.rows.stop for block in blocks[:-1])] and blocks[-1].rows.stop == stop


def test_what_is_taken_is_in_the_record(use):
    pieces = pieces_of(odd_model.SPEC, odd_model.layout("transposed_interleaved"))
    ops = {path: of[0].op for path, of in pieces.items()}
    assert ops["params.layers.2.attn.gate.kernel"] == "linear, rows 6:12 of 12"
    assert ops["experts.0.up"] == "copy, columns 1:2 of 2"
    assert ops["params.embed.table"] == "copy" and ops["params.lm_head.kernel"] == "linear"


@pytest.mark.parametrize(
    ("path", "rule", "message"),
    [
        ("attn.sinks.scale", None, "no rule for the leaf params.layers.2.attn.sinks.scale"),
        ("attn.sinks.scale", Rule("t", rows=(0, 3, 4)), r"attn.sinks.scale \[4\] doesn't go with it: 4 rows of 0:3 of every 4"),
        ("attn.sinks.scale", Rule("t", rows=lambda layer: layer.delta.conv), "'NoneType' object has no attribute 'conv'"),
        ("attn.sinks.scale", Rule("t", order=(1, 0)), r"order \(1, 0\) of 1 axes"),
        ("attn.v.kernel", Rule("model.layers.{layer}.self_attn.q_proj.weight", in_axes=1), r"would have the shapes \[12, 32\] and \[48, 32\]"),
    ],
)
def test_layouts_that_do_not_fit_the_model(path, rule, message):
    layout = odd_model.layout()
    rules = {name: own for name, own in layout.layer.items() if name != path} | ({} if rule is None else {path: rule})
    with pytest.raises(CheckpointError, match=message):
        hf_tensors(odd_model.SPEC, dataclasses.replace(layout, layer=rules))


def test_leaves_are_all_there():
    """The loops above put every leaf of the model into a tensor."""
    assert set(odd_model.random_leaves()) == set(leaf_paths(odd_model.SPEC)) == set(pieces_of(odd_model.SPEC, odd_model.layout()))
