"""Name maps: every tensor is accounted for, both ways, and each arrangement has its inverse."""

import numpy as np
import pytest

from checkpoints.errors import CheckpointError
from checkpoints.families import LAYOUTS, choose_layout, hf_tensors, ignorable, leaf_paths, pieces_of
from jaxmoe.spec import ModelSpec
from tests.checkpoints import hf_folders


def cases():
    return [(family, fused) for family in hf_folders.CONFIGS for fused in (False, True)]


@pytest.mark.parametrize(("family", "fused"), cases())
def test_names_and_shapes_are_those_of_the_folder(family, fused):
    config = hf_folders.CONFIGS[family]
    spec = ModelSpec.from_hf(config)
    folder = hf_folders.shapes(config, fused)
    layout = choose_layout(spec, folder)
    assert {name: shape for name, (shape, _) in hf_tensors(spec, layout).items()} == folder
    assert layout is LAYOUTS[family][fused]


@pytest.mark.parametrize(("family", "fused"), cases())
def test_pieces_cover_every_element_once(family, fused):
    spec = ModelSpec.from_hf(hf_folders.CONFIGS[family])
    layout = LAYOUTS[family][fused]
    leaves = leaf_paths(spec)
    for path, pieces in pieces_of(spec, layout).items():
        assert sum(p.rows * p.cols for p in pieces) == int(np.prod(leaves[path].shape)), path
    for name, (shape, parts) in hf_tensors(spec, layout).items():
        seen = np.zeros(int(np.prod(shape)), int)
        for _, piece in parts:
            piece.view(seen)[...] += 1
        assert (seen == 1).all(), name


@pytest.mark.parametrize(("family", "fused"), cases())
def test_to_hf_is_the_inverse_of_to_leaf(family, fused):
    spec = ModelSpec.from_hf(hf_folders.CONFIGS[family])
    rng = np.random.default_rng(0)
    for path, pieces in pieces_of(spec, LAYOUTS[family][fused]).items():
        for piece in pieces:
            matrix = rng.standard_normal((piece.rows, piece.cols))
            leaf = piece.to_leaf(matrix)
            assert leaf.shape == piece.shape, path
            np.testing.assert_array_equal(piece.to_hf(leaf), matrix)
            step = piece.rows_per_step  # a part of the rows is a part of the leaf
            part = piece.to_leaf(matrix[step : 2 * step])
            np.testing.assert_array_equal(part, np.take(leaf, [1], axis=piece.row_axis))


def test_trees_written_out_by_hand():
    """An exporter's view: leaves of the hand-written trees give back the folder's tensors."""
    for family, config in hf_folders.CONFIGS.items():
        spec = ModelSpec.from_hf(config)
        tensors = hf_folders.random_tensors(config)
        params, experts = hf_folders.expected_trees(config, tensors)
        for folder, layout in zip((tensors, hf_folders.fuse(config, tensors)), LAYOUTS[family], strict=True):
            for name, (shape, parts) in hf_tensors(spec, layout).items():
                got = np.empty(shape, np.float32)
                for path, piece in parts:
                    node = {"params": params, "experts": experts}
                    for key in path.split("."):
                        node = node[key]
                    view = piece.view(got)
                    view[...] = piece.to_hf(node if piece.expert is None else node[piece.expert]).reshape(view.shape)
                np.testing.assert_array_equal(got, folder[name], err_msg=name)


def test_mixtral_w1_is_gate_and_w3_is_up():
    spec = ModelSpec.from_hf(hf_folders.CONFIGS["mixtral"])
    pieces = pieces_of(spec, LAYOUTS["mixtral"][0])
    names = {name: pieces[f"experts.1.{name}"][2].hf.split(".")[-2] for name in ("gate", "up", "down")}
    assert names == {"gate": "w1", "up": "w3", "down": "w2"}


def test_ignorable():
    spec = ModelSpec.from_hf(hf_folders.CONFIGS["olmoe"])
    tied = ModelSpec.from_hf({**hf_folders.CONFIGS["olmoe"], "tie_word_embeddings": True})
    layout = LAYOUTS["olmoe"][0]
    assert ignorable(spec, layout, "model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not ignorable(spec, layout, "model.layers.3.self_attn.q_proj.weight")
    assert not ignorable(spec, layout, "lm_head.weight")
    assert ignorable(tied, layout, "lm_head.weight")


def test_family_without_names():
    import dataclasses

    spec = dataclasses.replace(ModelSpec.from_hf(hf_folders.CONFIGS["olmoe"]), family="other")
    with pytest.raises(CheckpointError, match="other"):
        choose_layout(spec, [])
