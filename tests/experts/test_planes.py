"""Bit planes: every prefix against a plain decoder of its bytes, upgrades, and errors against plain rounding."""

import ml_dtypes
import numpy as np
import pytest

from jaxmoe import formats
from jaxmoe.experts.planes import BASE, MOST, PlaneFormat, build_planes, encode, errors, pack_planes, plane_format, unpack_planes, upgraded
from jaxmoe.experts.source import ExpertSource, LadderSource
from jaxmoe.spec import ModelSpec
from tests.models import CONFIGS

FMT = PlaneFormat(64, 32, "d2f", "float32", 32)


def record_of(fmt: PlaneFormat, seed: int = 0) -> np.ndarray:
    return formats.store_numpy(np.random.default_rng(seed).standard_normal((fmt.weights // 256, 256), dtype=np.float32), fmt.dtype)


def by_bytes(fmt: PlaneFormat, data: np.ndarray, bits: int) -> list[np.ndarray]:
    """The matrices [K, N], weight by weight, from a prefix of the bytes."""
    at, out = 0, [np.zeros(shape, np.float32) for shape in fmt.matrices]
    for b in range(BASE, bits + 1):
        per_byte, count = (4, 2) if b == BASE else (8, 1)
        piece = fmt.group // per_byte
        for w in out:
            k, n = w.shape
            codes = data[at : at + k * n // per_byte].reshape(k // per_byte, n)
            at += codes.size
            numbers = data[at : at + 2 * count * k // fmt.group * n].view(ml_dtypes.bfloat16).astype(np.float32).reshape(-1, count, n)
            at += 2 * numbers.size
            for row in range(k):
                g, place = divmod(row, fmt.group)
                shift = place // piece * (8 // per_byte)
                code = codes[g * piece + place % piece] >> shift & (3 if b == BASE else 1)
                w[row] += numbers[g, 0] + numbers[g, 1] * code.astype(np.float32) if b == BASE else np.where(code == 1, 1, -1) * numbers[g, 0]
    assert at == fmt.bytes(bits)
    return out


def in_record(fmt: PlaneFormat, matrices: list[np.ndarray]) -> np.ndarray:
    w_in = matrices[0].reshape(fmt.width, 2, fmt.hidden)
    first, second = formats.expert_axes(fmt.layout)
    flat = np.concatenate([w_in.transpose(np.argsort(first)).reshape(-1), matrices[1].transpose(second).reshape(-1)])
    return formats.store_numpy(flat, fmt.dtype).reshape(-1, 256)


@pytest.mark.parametrize(("layout", "dtype"), [("d2f", "float32"), ("2fd", "bfloat16"), ("2df", "bfloat16")])
def test_a_prefix_unpacks_to_what_its_bytes_say(layout, dtype):
    fmt = PlaneFormat(64, 32, layout, dtype, 32)
    data = pack_planes(fmt, record_of(fmt))
    for bits in (3,):
        prefix = data[: fmt.bytes(bits)]
        record = np.asarray(unpack_planes(fmt, prefix, bits))
        np.testing.assert_array_equal(record, in_record(fmt, by_bytes(fmt, prefix, bits)))


def test_an_upgrade_gives_the_bits_of_the_longer_prefix():
    data = pack_planes(FMT, record_of(FMT))
    whole = np.asarray(unpack_planes(FMT, data[: FMT.bytes(4)], 4))
    for held in (3,):
        some = unpack_planes(FMT, data[: FMT.bytes(held)], held)
        assert (np.asarray(some) != whole).any()
        np.testing.assert_array_equal(np.asarray(upgraded(FMT, some, data[FMT.bytes(held) : FMT.bytes(4)], held, 4)), whole)


def test_impossible_upgrades_are_refused():
    narrow = PlaneFormat(64, 32, "d2f", "bfloat16", 32)
    with pytest.raises(ValueError, match="bfloat16 can't be upgraded in place: unpack all of its 4 bits"):
        upgraded(narrow, record_of(narrow), np.zeros(1, np.uint8), 2, 4)
    with pytest.raises(ValueError, match="from 4 to 4 bits"):
        upgraded(FMT, record_of(FMT), np.zeros(1, np.uint8), 4, 4)


def test_errors_fall_with_bits_and_low_ones_are_below_plain_rounding():
    found = errors(FMT, record_of(FMT))
    ours, plain = np.array([found[b] for b in range(BASE, MOST + 1)]).T
    assert (np.diff(ours) < 0).all() and ours[-1] < 0.01
    assert (ours[:2] < 0.95 * plain[:2]).all() and (ours < 1.25 * plain).all()


def test_fitting_again_lowers_the_weighted_error():
    w = np.random.default_rng(1).standard_normal((64, 48)).astype(np.float32)

    def weighted(rounds: int) -> float:
        codes, numbers = encode(w, 32, rounds)
        x, total = w.reshape(2, 32, 48), 0.0
        value = numbers[:, :1] + numbers[:, 1:2] * (codes & 3)
        for bits in range(BASE, MOST + 1):
            value = value if bits == BASE else value + np.where(codes >> (bits - 1) & 1, 1, -1) * numbers[:, bits - 1 : bits]
            total += 2**bits * float(((value - x) ** 2).sum())
        return total

    assert weighted(3) < 0.99 * weighted(0)


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_a_group_of_one_value_stays_near_it(value):
    record = np.full((FMT.weights // 256, 256), value, np.float32)
    data = pack_planes(FMT, record)
    for bits in (3, 4):
        np.testing.assert_allclose(np.asarray(unpack_planes(FMT, data[: FMT.bytes(bits)], bits)), record, rtol=0.01)


def test_bytes_are_those_of_codes_and_numbers():
    weights = 3 * 64 * 32
    assert FMT.bytes(2) == weights * 2 // 8 + 2 * 2 * weights // 32
    assert FMT.bytes(6) - FMT.bytes(5) == weights // 8 + 2 * weights // 32
    assert FMT.starts[-1] == FMT.bytes(8) == len(pack_planes(FMT, record_of(FMT)))
    with pytest.raises(ValueError, match="9 bits: experts come at 2 to 8"):
        FMT.bytes(9)
    with pytest.raises(ValueError, match="a weight that is not finite"):
        pack_planes(FMT, np.full((FMT.weights // 256, 256), np.inf, np.float32))
    with pytest.raises(ValueError, match="groups of 48 weights"):
        PlaneFormat(64, 32, group=48)


def test_a_ladder_source_gives_any_precision_and_its_bytes():
    spec = ModelSpec.from_hf(CONFIGS["qwen3_moe"]).with_precision("bfloat16")
    fmt, seen = plane_format(spec), []
    records = np.stack([record_of(fmt, seed) for seed in range(10)])
    assert (fmt.group, fmt.dtype) == (32, "bfloat16")
    source = LadderSource.from_records(spec, records, fmt, lambda *done: seen.append(done))
    assert seen == [(i + 1, 10) for i in range(10)]
    assert source.host_bytes == records.nbytes + 10 * fmt.bytes(8) and source.record_bytes == source.bytes_at(0) == records[0].nbytes
    np.testing.assert_array_equal(source.ask(1, 1)(), records[9])
    for bits in (2, 4):
        chunks = source.ask(1, 1, bits)()
        assert sum(c.nbytes for c in chunks) == source.bytes_at(bits) == fmt.bytes(bits)
        whole = unpack_planes(fmt, pack_planes(fmt, records[9])[: fmt.bytes(bits)], bits)
        np.testing.assert_array_equal(np.asarray(unpack_planes(fmt, chunks, bits)), np.asarray(whole))
    few = LadderSource(ExpertSource(spec, records), fmt, build_planes(fmt, records)[:, : fmt.bytes(4)], 8)
    with pytest.raises(ValueError, match="5 bits: the planes in host memory are those of 2 to 4 bits"):
        few.ask(0, 0, 5)
