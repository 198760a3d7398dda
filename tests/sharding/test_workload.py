"""What is asked of a mesh: every field is checked by name, and what follows for one group of devices is exact."""

import json

import pytest

from sharding.split import Layout, Split, SplitError
from sharding.workload import Workload

TWO = Layout(Split(data=2), batch=("data",))


@pytest.mark.parametrize(
    ("field", "value"),
    [("rows", 0), ("rows", 1.5), ("rows", True), ("prompt", 0), ("new_tokens", -1), ("prefill_tokens", 0), ("slots", 0), ("staging", -1),
     ("dtype", "int8"), ("kv_dtype", None)],
)  # fmt: skip
def test_nonsense_names_its_field(field, value):
    with pytest.raises(ValueError, match=f"^{field} = {value!r}"):
        Workload(**{field: value})


def test_what_a_group_of_devices_gets():
    w = Workload(rows=4, prompt=300, new_tokens=20, prefill_tokens=512)
    assert w.positions == 320 and w.local_rows(TWO) == w.decode_tokens(TWO) == 2
    with pytest.raises(SplitError, match="rows = 3 don't divide among 2"):
        Workload(rows=3).local_rows(TWO)


def test_json_and_back():
    w = Workload(rows=3, slots=5, kv_dtype="float32")
    assert Workload.from_json(json.loads(json.dumps(w.to_json()))) == w and not w.resident
    with pytest.raises(ValueError, match="workload.colour is not known"):
        Workload.from_json({"colour": 1})
    with pytest.raises(ValueError, match="workload = 3"):
        Workload.from_json(3)
