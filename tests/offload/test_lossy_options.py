"""What a user writes for a lossy setting."""

import pytest

from jaxmoe.experts.lossy import Lossy
from jaxmoe.offload.lossy_options import parse_lossy

WRITTEN = {
    "hobbit": Lossy(high=0.6, low=0.9, low_bits=4),
    "hobbit,low_bits=2": Lossy(high=0.6, low=0.9, low_bits=2),
    "drop-cold": Lossy(cold=0.75),
    "cold=0.5, prior=0.1,kept=2": Lossy(cold=0.5, prior=0.1, kept=2),
    "bits=3": Lossy(widths=((3,) * 4,) * 2),
    "fate-prefill": Lossy(unpopular=0.25),
    "high=1": Lossy(),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_written_is_what_is_meant(text):
    assert parse_lossy(text, 2, 4) == WRITTEN[text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--lossy : give hobbit, drop-cold"),
        ("hobit", "--lossy hobit: give hobbit"),
        ("cold=much", "--lossy cold=much: 'much' is no number that cold can be"),
        ("bits=1", "1 bits: experts come at 2 to 8 bits"),
        ("cold=2", "cold = 2.0: give 0"),
    ],
)
def test_bad_input_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_lossy(text, 2, 4)
