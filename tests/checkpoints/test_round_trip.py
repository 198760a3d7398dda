"""Hugging Face folders converted and exported again: every family, every layout, every dtype, bit for bit, read by the reference's own library."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints import commit
from checkpoints.convert import convert
from checkpoints.export import export_checkpoint
from checkpoints.families import LAYOUTS, Layout, hf_tensors
from jaxmoe.spec import ModelSpec
from scripts import golden_cases
from tests.checkpoints import hf_folders

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
HEADS = {"deepseek_v3": "deepseek_v3_yarn", "glm4_moe": "glm4_moe_normalized", "kimi_k2": "kimi_k2"}
"""Families and cases that go with a head of multi-token prediction too."""


@dataclasses.dataclass(frozen=True)
class Trip:
    """A golden case's config, with tensors in one layout and one dtype."""

    case: str
    layout: Layout
    dtype: type
    head: bool = False

    @property
    def id(self) -> str:
        return f"{self.case}-{self.layout.name}-{np.dtype(self.dtype).name}{'-head' * self.head}"

    @property
    def config(self) -> dict:
        """The case's; with a head of multi-token prediction if wanted."""
        return golden_cases.CASES[self.case].config | ({"num_nextn_predict_layers": 1} if self.head else {})


def trips() -> list[Trip]:
    """Every golden case in one of its family's layouts for plain weights, and every layout that this leaves out; dtypes take turns."""
    found = []
    for family, cases in golden_cases.FAMILIES.items():
        layouts = [layout for layout in LAYOUTS[family] if not layout.packed]
        names = [*cases, *[next(iter(cases))] * max(0, len(layouts) - len(cases))]
        found += [(name, layouts[i % len(layouts)]) for i, name in enumerate(names)]
    plain = [Trip(name, layout, DTYPES[i % len(DTYPES)]) for i, (name, layout) in enumerate(found)]
    heads = [Trip(name, LAYOUTS[family][i], DTYPES[i]) for family, name in HEADS.items() for i in (0, 1)]
    return plain + [dataclasses.replace(trip, head=True) for trip in heads]


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Nobody cuts the power here, and waiting for the disk would take a third of the time."""
    monkeypatch.setattr(commit, "sync", lambda path, forget=False: None)


def random_tensors(spec, layout, dtype):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype=np.float32).astype(dtype) for name, (shape, _) in hf_tensors(spec, layout).items()}


def read_folder(folder):
    """All tensors of a folder, by the reference's reader."""
    found = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert len(set().union(*found)) == sum(map(len, found))
    return {name: value for part in found for name, value in part.items()}


def assert_same(got, expected):
    """Names, dtypes, shapes and bytes."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert got[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("trip", trips(), ids=lambda trip: trip.id)
def test_everything_comes_back(tmp_path, trip):
    tensors = random_tensors(ModelSpec.from_hf(trip.config), trip.layout, trip.dtype)
    hf = hf_folders.write_folder(tmp_path / "hf", trip.config, tensors, shards=2)
    manifest = convert(hf, tmp_path / "converted")
    whole = sum(value.nbytes for value in tensors.values())
    done = export_checkpoint(tmp_path / "converted", tmp_path / "back", max_shard_bytes=whole // 2)
    assert_same(read_folder(tmp_path / "back"), tensors)
    assert manifest.names == done.layout == trip.layout.name
    assert len(done.files) > 1 and (tmp_path / "back" / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    assert not (done.rounded or done.narrowed or done.dequantized or done.unpacked or done.copies or done.missing)


def test_every_layout_and_every_case_is_there():
    layouts = {layout.name for layouts in LAYOUTS.values() for layout in layouts if not layout.packed}
    assert {trip.layout.name for trip in trips()} == layouts
    assert {trip.case for trip in trips()} == golden_cases.CASES.keys()
    assert all(ModelSpec.from_hf(trip.config).extra_heads for trip in trips() if trip.head)
