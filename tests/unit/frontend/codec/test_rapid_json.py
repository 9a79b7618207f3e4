"""RapidJSON's dialect: values, faults and layout (spec H-002, H-014, H-015, H-076, H-078)."""

import json
import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.frontend.codec import rapid_json
from forebay.frontend.codec.rapid_json import (
    SCANNER_LIMIT_BYTES,
    as_array,
    as_bool,
    as_double,
    as_int,
    as_object,
    as_string,
    as_text,
    as_uint,
    dump_json,
    find,
    format_double,
    has,
    member,
    parse_json,
    quote,
    quote_bytes,
    to_double,
    to_utf8,
)
from forebay.ipc.errors import Internal, InvalidArgument, ServingError

PREFIX = "failed to parse the request JSON buffer: "


def fault(data):
    with pytest.raises(Internal) as caught:
        parse_json(data)
    assert caught.value.text.startswith(PREFIX)
    return caught.value.text.removeprefix(PREFIX)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"xx", "Invalid value. at 0"),  # E-047
        (b"", "The document is empty. at 0"),  # E-125
        (b" ", "The document is empty. at 1"),
        (b"{", "Missing a name for object member. at 1"),
        (b'{"a"', "Missing a colon after a name of object member. at 4"),
        (b'{"a":', "Invalid value. at 5"),
        (b'{"a":1 "b":2}', "Missing a comma or '}' after an object member. at 7"),
        (b'{"a":1,}', "Missing a name for object member. at 7"),
        (b"[1 2]", "Missing a comma or ']' after an array element. at 3"),
        (b"[1,]", "Invalid value. at 3"),
        (b'"\\x"', "Invalid escape character in string. at 1"),
        (b'"a\tb"', "Invalid escape character in string. at 2"),
        (b'"abc', "Missing a closing quotation mark in string. at 4"),
        (b'"\\u12g4"', "Incorrect hex digit after \\u escape in string. at 1"),
        (b'"\\ud800x"', "The surrogate pair in string is invalid. at 1"),
        (b"[1.]", "Miss fraction part in number. at 3"),
        (b"1e", "Miss exponent in number. at 2"),
        (b"-", "Invalid value. at 1"),
        (b"[2,1e400]", "Number too big to be stored in double. at 3"),
        (b"Infinit", "Invalid value. at 7"),
        (b"nul", "Invalid value. at 3"),
        (b"{}x", "The document root must not be followed by other values. at 2"),
        (b"[1] {}", "The document root must not be followed by other values. at 4"),
        (b"1e309", "Number too big to be stored in double. at 0"),
        (b"[1\x00]", "Missing a comma or ']' after an array element. at 2"),
        ('["é", x]'.encode(), "Invalid value. at 7"),  # offsets count bytes
    ],
)
def test_faults_have_the_text_and_offset_of_rapidjson(data, text):
    assert fault(data) == text


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a":1} \x00trailing', {"a": 1}),
        (b"[1]\x00\x01", [1]),
        (b"[Infinity,-Infinity,Inf,-Inf,1e39]", [math.inf, -math.inf, math.inf, -math.inf, 1e39]),
        (b"[2e308,-11111111111111111111e300]", [math.inf, -math.inf]),
        (b"\xef\xbb\xbf{}", {}),
        (b"[18446744073709551615,-9223372036854775808]\x00", [2**64 - 1, -(2**63)]),
        (b"[1,1.0,true]", [1, 1.0, True]),
        (b'["\\u00e9\\ud83d\\ude00\\/\\n"]\x00', ["é😀/\n"]),
        (b'{"a":[],"b":{},"c":[null,false]}\x00', {"a": [], "b": {}, "c": [None, False]}),
    ],
)
def test_dialect_values(data, value):
    """Spec H-015: NaN and Infinity are numbers, a NUL ends the document."""
    parsed = parse_json(data)
    assert parsed == value
    assert json.dumps(parsed) == json.dumps(value)  # 1, 1.0 and true are equal, but not the same


def test_nan_is_a_number():
    parsed = parse_json(memoryview(b"[NaN,-NaN]"))
    assert isinstance(parsed, list)
    assert all(isinstance(value, float) and math.isnan(value) for value in parsed)


def test_integers_beyond_64_bits_are_doubles():
    assert parse_json(b"[18446744073709551616]") == [2.0**64]
    assert isinstance(as_array(parse_json(b"[18446744073709551616]\x00"))[0], float)


@pytest.mark.parametrize("data", [b'["a\xff\xc3"]', b'["a\xff\xc3"]' + b" " * SCANNER_LIMIT_BYTES])
def test_bytes_that_are_no_utf8_survive(data):
    """Spec H-078: BYTES elements come out as they went in."""
    (text,) = as_array(parse_json(data))
    assert to_utf8(as_string(text)) == b"a\xff\xc3"
    assert quote(as_string(text)) == b'"a\xff\xc3"'
    as_text(text).encode()


def test_lone_low_surrogate_passes_as_its_three_bytes():
    assert to_utf8(as_string(parse_json(b'"\\udc00"'))) == b"\xed\xb0\x80"


def test_nesting_is_limited():
    """Spec H-014; brackets in strings do not count."""
    assert parse_json(b"[" * 100 + b"]" * 100) != []
    with pytest.raises(InvalidArgument, match=r"^JSON nesting depth exceeds maximum allowed limit \(100\)$"):
        parse_json(b"[" * 101 + b"]" * 101)
    with pytest.raises(InvalidArgument, match="nesting depth"):
        parse_json(b'{"a":' * 101 + b"1" + b"}" * 101)
    with pytest.raises(InvalidArgument, match="nesting depth"):
        parse_json(b"[" * 100_000)
    wide = b"[" + b",".join([b'["[[["]'] * 200) + b"]"
    assert len(as_array(parse_json(wide))) == 200
    tricky = b'["' + b"]" * 60 + b'",' + b"[" * 101 + b"]" * 101 + b"]"
    with pytest.raises(InvalidArgument, match="nesting depth"):
        parse_json(tricky)


def test_unterminated_strings_cost_no_more_than_their_length():
    """Quadratic work here would take hours."""
    assert fault(b"[" * 99 + b'["[{' + b'\\"' * 2_000_000).startswith("Missing a closing quotation mark in string.")


@pytest.mark.parametrize(
    ("tail", "text"),
    [
        (b"x]", "Invalid value."),
        (b"1", "Missing a comma or ']' after an array element."),
        (b'{"a":1 2}]', "Missing a comma or '}' after an object member."),
        (b"{1}]", "Missing a name for object member."),
        (b'{"a" 1}]', "Missing a colon after a name of object member."),
        (b'"abc', "Missing a closing quotation mark in string."),
        (b'"\t"]', "Invalid escape character in string."),
        (b'"\\u12g4"]', "Incorrect hex digit after \\u escape in string."),
        (b"1" * 5000, "Number too big to be stored in double."),
    ],
)
def test_faults_of_large_documents_are_translated(tail, text):
    assert fault(b"[" + b"1," * SCANNER_LIMIT_BYTES + tail).startswith(text)


def test_large_documents_may_use_the_dialect():
    values = as_array(parse_json(b"[" + b"1.5," * SCANNER_LIMIT_BYTES + b"NaN] \x00trailing"))
    assert len(values) == SCANNER_LIMIT_BYTES + 1


@given(st.binary(max_size=60) | st.text('{}[]",:0123456789.eE+-truefalsnINy\\ \n', max_size=60).map(str.encode))
def test_any_bytes_parse_or_are_refused(data):
    with suppress(ServingError):
        dump_json(parse_json(data))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON_VALUES)
def test_written_json_reads_back(value):
    """Also through the scanner, which a trailing NUL forces."""
    text = dump_json(value)
    assert parse_json(text) == value
    assert parse_json(text + b"\x00") == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        (1.0, "1.0"),
        (-0.0, "-0.0"),
        (1e-7, "1e-7"),
        (1e-5, "0.00001"),
        (1.5e-6, "0.0000015"),
        (1e300, "1e300"),
        (1e20, "100000000000000000000.0"),
        (1e21, "1e21"),
        (123456.789, "123456.789"),
        (5e-324, "5e-324"),
        (0.10000000149011612, "0.10000000149011612"),
        (-2.5e-9, "-2.5e-9"),
        (math.nan, "NaN"),
        (-math.inf, "-Infinity"),
    ],
)
def test_doubles_are_laid_out_like_rapidjson(value, text):
    """Spec H-076, E-105, E-107."""
    assert format_double(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_doubles_keep_their_value(value):
    assert float(format_double(value)) == value


def test_strings_escape_only_what_must():
    assert quote('a"\\/\n\x1f\x7fé') == '"a\\"\\\\/\\n\\u001F\x7fé"'.encode()
    assert quote_bytes(memoryview(b"\xff\x00\b\f\r\t")) == b'"\xff\\u0000\\b\\f\\r\\t"'
    assert quote("\ud800") == b'"\xed\xa0\x80"'


def test_dump_refuses_what_json_has_not():
    assert dump_json({"a": (1, None, b"x")}) == b'{"a":[1,null,"x"]}'
    with pytest.raises(TypeError):
        dump_json({1, 2})


@pytest.mark.parametrize(
    ("access", "value", "text"),
    [
        (as_string, 5, "attempt to access JSON non-string as string"),
        (as_bool, 1, "attempt to access JSON non-boolean as boolean"),
        (as_int, 1.0, "attempt to access JSON non-signed-integer as signed-integer"),
        (as_int, True, "attempt to access JSON non-signed-integer as signed-integer"),
        (as_int, 2**63, "attempt to access JSON non-signed-integer as signed-integer"),
        (as_uint, -1, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        (as_uint, True, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        (as_double, "1", "attempt to access JSON non-number as double"),
        (as_double, False, "attempt to access JSON non-number as double"),
        (as_array, {}, "attempt to access JSON non-array as array"),
        (as_object, [], "attempt to access JSON non-object as object"),
    ],
)
def test_typed_access_names_both_types(access, value, text):
    with pytest.raises(Internal) as caught:
        access(value)
    assert caught.value.text == text


def test_members():
    assert member({"a": None}, "a") is None
    assert has({"a": None}, "a")
    assert not has([1], "a")
    assert find({"a": 1}, "a") == 1
    assert find(None, "a") is None
    with pytest.raises(Internal, match=r"^attempt to access non-existing object member 'inputs'$"):
        member([], "inputs")


def test_huge_integers_become_infinite():
    assert to_double(10**400) == math.inf
    assert to_double(-(10**400)) == -math.inf
    assert as_double(3) == 3.0
    assert rapid_json.is_int64(2**63) is False
