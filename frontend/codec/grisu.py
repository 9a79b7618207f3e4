"""Decimal digits of a double as RapidJSON 1.1 finds them: Florian Loitsch's Grisu2, which is not always the closest.

Triton's JSON replies are printed by it (spec H-076), so a reader of their text sees its digits: always enough to read
the same double back, sometimes one more than needed, and not always rounded to the nearest in the last place.
Names are those of RapidJSON's `internal/dtoa.h` and `internal/diyfp.h`, whose arithmetic on 64 bits this is.
"""

from __future__ import annotations

import functools
import struct

_HIDDEN_BIT = 1 << 52
_MANTISSA = _HIDDEN_BIT - 1
_EXPONENT_BIAS = 0x3FF + 52
_HALF = 1 << 63
_LOG10_OF_2 = 0.30102999566398114
#: Cached powers are 10^-348, 10^-340 ... 10^340.
_FIRST_POWER, _POWER_STEP = -348, 8
#: From so many digits after the first on, RapidJSON does not weigh the last digit: its table of powers ends.
_WEIGHED_DIGITS = 9


def decimal_digits(value: float) -> tuple[str, int]:
    """Return digits and exponent of a positive, finite double: ``digits * 10**exponent`` reads back as it."""
    (bits,) = struct.unpack("<Q", struct.pack("<d", value))
    biased = bits >> 52
    mantissa = bits & _MANTISSA
    if biased:
        mantissa, exponent = mantissa | _HIDDEN_BIT, biased - _EXPONENT_BIAS
    else:
        exponent = 1 - _EXPONENT_BIAS
    # The numbers half way to the neighbours, and the double itself, in 64 bits with one exponent.
    shift = 63 - mantissa.bit_length()
    upper = ((mantissa << 1) + 1) << shift
    upper_exponent = exponent - 1 - shift
    if mantissa == _HIDDEN_BIT:
        lower = ((mantissa << 2) - 1) << (exponent - 2 - upper_exponent)
    else:
        lower = ((mantissa << 1) - 1) << shift
    power, power_exponent, decimal_exponent = _cached_power(upper_exponent)
    scaled = _product(mantissa << (shift + 1), power)
    scaled_upper = _product(upper, power) - 1
    delta = scaled_upper - (_product(lower, power) + 1)
    fraction_bits = -(upper_exponent + power_exponent + 64)
    return _generate(scaled_upper - scaled, scaled_upper, delta, fraction_bits, decimal_exponent)


def _product(a: int, b: int) -> int:
    """Return the upper half of a product of 64-bit numbers, rounded."""
    return (a * b + _HALF) >> 64


def _cached_power(exponent: int) -> tuple[int, int, int]:
    """Return a power of ten (64 bits, binary exponent) that brings a number into reach, and the exponent it leaves."""
    estimate = (-61 - exponent) * _LOG10_OF_2 + 347
    k = int(estimate)
    if estimate > k:
        k += 1
    index = (k >> 3) + 1
    decimal = _FIRST_POWER + index * _POWER_STEP
    return (*_power_of_ten(decimal), -decimal)


@functools.cache
def _power_of_ten(decimal: int) -> tuple[int, int]:
    """Return the nearest 64-bit significand and its binary exponent."""
    if decimal >= 0:
        exact, exponent = 10**decimal << 64, -64
    else:
        bits = (10**-decimal).bit_length() + 128
        exact, exponent = (1 << bits) // 10**-decimal, -bits
    excess = exact.bit_length() - 64
    significand = (exact + (1 << (excess - 1))) >> excess
    return significand, exponent + excess


def _generate(distance: int, upper: int, delta: int, fraction_bits: int, exponent: int) -> tuple[str, int]:
    """Write digits of ``upper`` until what is left lies within ``delta``, then move the last one towards the number.

    Args:
        distance: from the number to ``upper``.
    """
    one = 1 << fraction_bits
    whole, fraction = upper >> fraction_bits, upper & (one - 1)
    text = str(whole)
    for kappa in range(len(text) - 1, -1, -1):
        ten_kappa = 10**kappa
        rest = ((whole % ten_kappa) << fraction_bits) + fraction
        if rest <= delta:
            digits = int(text[: len(text) - kappa])
            return _round(digits, delta, rest, ten_kappa << fraction_bits, distance), exponent + kappa
    digits, kappa = whole, 0
    while True:
        fraction *= 10
        delta *= 10
        digits = digits * 10 + (fraction >> fraction_bits)
        fraction &= one - 1
        kappa += 1
        if fraction < delta:
            weighed = distance * 10**kappa if kappa < _WEIGHED_DIGITS else 0
            return _round(digits, delta, fraction, one, weighed), exponent - kappa


def _round(digits: int, delta: int, rest: int, ten_kappa: int, distance: int) -> str:
    while (
        rest < distance
        and delta - rest >= ten_kappa
        and (rest + ten_kappa < distance or distance - rest > rest + ten_kappa - distance)
    ):
        digits -= 1
        rest += ten_kappa
    return str(digits)
