"""Machines by name: sizes, shapes, and the links that an axis of a mesh goes over; and this machine's own numbers."""

import dataclasses
import json

import pytest

from sharding import measure
from sharding.hardware import ALIASES, CHIPS, Machine, compact, hardware_from_json, parse_hardware
from sharding.split import Split


@pytest.mark.parametrize(
    ("text", "devices", "hosts"),
    [("h100", 1, 1), ("h100:8", 8, 1), ("h100:2x8", 16, 2), ("rtx4090:2", 2, 1), ("v5e:4x4", 16, 2), ("v5e", 1, 1), ("v5p:2x2x1", 4, 1),
     ("v5p:4x4x4", 64, 16), ("tpu7x:2x2x1", 8, 1), ("V6E:2x4", 8, 1)],
)  # fmt: skip
def test_a_machine_by_name(text, devices, hosts):
    machine = parse_hardware(text)
    assert (machine.devices, machine.hosts) == (devices, hosts)
    assert parse_hardware(str(machine)) == machine


@pytest.mark.parametrize(
    ("text", "says"),
    [("g100:8", "'g100' is not known, choose from a100-40gb"), ("v5e:4", "torus of 2 dimensions"), ("v5p:4x4", "torus of 3 dimensions"),
     ("v5e:32x4", "at most 16x16"), ("h100:9", "at most 8 of h100; for more hosts write h100:2x8"), ("h100:0", "write how many"),
     ("h100:2x2x2", "HOSTSxDEVICES"), ("v5e:4x", "write how many"), ("v5e:4x3", "use v5e:4x2 or v5e:4x4"), ("v6e:3x5", "use v6e:2x4 or v6e:4x8"),
     ("v5p:2x3x6", "use v5p:2x2x4 or v5p:2x4x8")],
)  # fmt: skip
def test_machines_that_there_are_not(text, says):
    with pytest.raises(ValueError, match=says) as error:
        parse_hardware(text)
    assert text in str(error.value)


def test_every_device_is_whole():
    for name, h in CHIPS.items():
        assert h.name == name and h.usable_bytes < h.memory_bytes and h.flops("bfloat16") > h.flops("float32")
        assert hardware_from_json(json.loads(json.dumps(h.to_json()))) == h
    assert set(ALIASES.values()) <= set(CHIPS)
    assert CHIPS["v5e"].usable_bytes == int(15.75 * 2**30)  # what the compiler says of a program that is too large


@pytest.mark.parametrize(
    ("change", "says"),
    [({"hbm_bytes_per_s": 0}, "hardware.hbm_bytes_per_s = 0"), ({"bf16": None}, "hardware.bf16 = None"), ({"backend": "fpga"}, "hardware.backend"),
     ({"usable_bytes": 10**15}, "more than memory_bytes"), ({"price": float("inf")}, "hardware.price = inf"), ({"name": ""}, "hardware.name")],
)  # fmt: skip
def test_nonsense_names_its_field(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(CHIPS["l4"], **change)


def test_json_names_what_is_wrong():
    whole = CHIPS["l4"].to_json()
    with pytest.raises(ValueError, match="hardware.colour is not known"):
        hardware_from_json(whole | {"colour": 1})
    with pytest.raises(ValueError, match="hardware.bf16 is missing"):
        hardware_from_json({name: x for name, x in whole.items() if name != "bf16"})
    with pytest.raises(ValueError, match="int8 = 1|dtype = 'int8'"):
        CHIPS["v4"].flops("int8") and CHIPS["tpu7x"].flops("int8")


def test_levels_behind_a_switch():
    machine, split = parse_hardware("h100:2x8"), Split(data=2, tensor=8)
    (near,) = machine.levels(split, ("tensor",))
    assert (near.size, near.bytes_per_s, near.kind) == (8, 450e9, "switch")
    (far,) = machine.levels(split, ("data",))
    assert (far.size, far.bytes_per_s) == (2, 400e9 / 8)  # eight devices of a host send over its adapters at once
    assert [x.size for x in machine.levels(Split(data=16), ("data",))] == [8, 2]
    uneven = parse_hardware("h100:8").levels(Split(data=2, tensor=3), ("tensor", "data"))
    assert [(x.size, x.bytes_per_s) for x in uneven] == [(3, 450e9), (2, 450e9)] and parse_hardware("h100").levels(Split(), ("data",)) == ()


def test_levels_of_a_torus():
    small, pod = parse_hardware("v5e:4x4"), parse_hardware("v5e:16x16")
    line, ring = small.levels(Split(tensor=4), ("tensor",))[0], pod.levels(Split(tensor=16), ("tensor",))[0]
    assert (line.kind, line.bytes_per_s, line.hops) == ("line", 50e9, 3)
    assert (ring.kind, ring.bytes_per_s, ring.hops) == ("ring", 100e9, 8)
    apart = small.levels(Split(expert=2, tensor=2), ("expert",))[0]  # every other chip of a line: two groups share its links
    assert (apart.size, apart.bytes_per_s) == (2, 25e9)
    pair = parse_hardware("tpu7x:2x2x1").levels(Split(tensor=2), ("tensor",))
    assert [(x.size, x.kind) for x in pair] == [(2, "switch")]
    assert small.levels(Split(data=16), ("tensor",)) == ()


def test_more_of_the_same():
    assert str(parse_hardware("v5e:4x4").of(32)) == "v5e:4x8" and str(parse_hardware("h100:8").of(16)) == "h100:2x8"
    assert compact(64, 3) == (4, 4, 4) and compact(8, 2) == (2, 4) and compact(12, 3) == (1, 1, 12)
    with pytest.raises(ValueError, match="devices = 12"):
        parse_hardware("h100:8").of(12)
    for text, devices in (("v5e:4x4", 12), ("v5e:16x16", 512), ("v5p:2x2x1", 6)):
        with pytest.raises(ValueError, match=f"devices = {devices}: there is no slice|at most 16x16"):
            parse_hardware(text).of(devices)
    for text in ("v5e", "v5p", "tpu7x"):
        for devices in (2**i for i in range(1, 8)):
            assert parse_hardware(str(parse_hardware(text).of(devices))).devices == devices
    assert [parse_hardware(text).per_host for text in ("h100:4x2", "h100:2x8", "v5e:4x4", "v5p:2x2x1", "v5e")] == [2, 8, 8, 4, 1]
    with pytest.raises(ValueError, match="devices = 3"):
        parse_hardware("tpu7x:2x2x1").of(3)


def test_this_machine_is_measured():
    told = []
    found = measure.measure(told.append, seconds=0.01)
    assert found.name.startswith("measured: ") and found.backend == "cpu" and "launch" in told and len(told) == 7
    assert 1e8 < found.hbm_bytes_per_s < 1e13 and found.fp32 > 1e8 and 0 < found.launch_s < 1 and found.link_bytes_per_s > 1e6
    assert found.usable_bytes <= found.memory_bytes and hardware_from_json(json.loads(json.dumps(found.to_json()))) == found
    assert parse_hardware("here:8", found) == Machine(found, (1, 8))


def test_devices_are_recognised():
    names = {"NVIDIA H100 80GB HBM3": "h100", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA A100-SXM4-40GB": "a100-40gb"}
    assert {kind: measure.known(kind).name for kind in names} == names and measure.known("cpu") is None
