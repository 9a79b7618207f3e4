"""Digits of doubles, compared with what a running Triton 2.51 printed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.frontend.codec.grisu import decimal_digits
from forebay.frontend.codec.rapid_json import format_double


@pytest.mark.parametrize(
    "text",
    [
        *("0.10000000149011612", "1.0000000116860974e-7", "16777216.0", "123456.7890625", "3.0000000054977559e38"),
        *("3.1415927410125734", "1.2345678918272928e29", "9.999999778196309e21", "18446744073709553000.0"),
        *("99999998430674950.0", "0.000043921376345679167", "1.1754943508222876e-38", "0.30000001192092898"),
        *("1.0000000200408774e21", "3.4028234663852887e38", "9.999999974752428e-7", "0.1", "1e-7", "1e300"),
    ],
)
def test_digits_of_a_running_triton(text: str) -> None:
    """Spec H-076; among them such as are not the closest to the number."""
    assert format_double(float(text)) == text


@given(st.floats(min_value=5e-324, allow_nan=False, allow_infinity=False))
def test_any_double_reads_back(value: float) -> None:
    digits, exponent = decimal_digits(value)
    assert len(digits) <= 17
    assert float(f"{digits}e{exponent}") == value
    assert float(format_double(-value)) == -value


@pytest.mark.parametrize(
    "value", [5e-324, 2.2250738585072014e-308, math.nextafter(1, 2), 2.0**-1022, 2.0**1023, math.inf]
)
def test_ends_of_the_range(value: float) -> None:
    assert float(format_double(value)) == value
