"""Files from strangers: whatever is in them, they are read or refused with one clean error, and cost little.

The parsers are the table in `parsers.py`; `fuzz/` runs the same table for longer.
"""

from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medmim.errors import LONGEST, MedmimError
from parsers import PARSERS, Parser

HOSTILE = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e-308, 1e308, math.nan, math.inf),
    *(
        "",
        "..",
        "../x",
        "/etc/passwd",
        "con",
        "a\0b",
        "\x1b]0;x\x07",
        "[bold]x[/]",
        "\ud800",
        "é\u202e",
        "x" * 10_000,
    ),
    *([], {}, [[]], [{}], {"": ""}, [1] * 5_000, {"a": {"a": {"a": {"a": {"a": {"a": {}}}}}}}),
)
NUMBERS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
TEXTS = (
    b"[" * 5_000,
    b"{" * 100,
    b"9" * 5_000,
    b"-1",
    b"nan",
    b"1e400",
    b"\0",
    b"\n",
    b"\xff",
    b"&a",
    b"*a",
    b"../",
    b'"',
)

QUICK = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# --- any bytes --------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """An honest file with a few edits: bytes replaced, put in, taken out or copied, numbers and texts that hurt."""
    for _ in range(draw(st.integers(1, 4))):
        # Headers are where the harm is, so half of the edits are there.
        start = draw(st.one_of(st.integers(0, min(len(content), 400)), st.integers(0, len(content))))
        length = draw(st.integers(0, 16))
        piece = draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from(TEXTS),
                st.builds(int.to_bytes, st.sampled_from(NUMBERS), st.just(8), st.sampled_from(["little", "big"])),
                st.just(content[start : start + 40]),
            )
        )
        content = content[:start] + piece + content[start + length :]
    return content if draw(st.booleans()) else content[: draw(st.integers(0, len(content)))]


def refuses_cleanly(parser: Parser, content: bytes) -> None:
    try:
        parser(content)
    except MedmimError as error:
        message = str(error)
        assert message.isprintable()
        assert 0 < len(message) <= LONGEST + 4


@pytest.mark.parametrize("name", PARSERS)
def test_an_honest_file_is_read(name):
    PARSERS[name](PARSERS[name].example())


@pytest.mark.parametrize("name", PARSERS)
def test_a_damaged_file_is_read_or_refused_cleanly(name, capfd):
    parser = PARSERS[name]

    @QUICK
    @given(damaged(parser.example()))
    def check(content):
        refuses_cleanly(parser, content)

    check()


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 500, b"{}", b"[]", b"null", b"1", b"[" * 100_000], ids=repr)
def test_what_is_no_such_file_at_all_is_refused_cleanly(name, content, capfd):
    refuses_cleanly(PARSERS[name], content)


# --- well-formed JSON that says something else ------------------------------------------------------------------------


@st.composite
def altered(draw: st.DrawFn, content: bytes) -> bytes:
    """Honest JSON with one or two values, at any depth, replaced by others, or a key by another."""
    data = [json.loads(content.splitlines()[0] if content.endswith(b"\n") else content)]
    for _ in range(draw(st.integers(1, 2))):
        place = data
        while True:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            deeper = isinstance(place[key], dict | list) and place[key]
            if not deeper or draw(st.integers(0, 4)) == 0:
                break
            place = place[key]
        if isinstance(place, dict) and draw(st.integers(0, 5)) == 0:
            place[draw(st.sampled_from([text for text in HOSTILE if isinstance(text, str)]))] = place.pop(key)
        else:
            place[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))  # a later edit may be inside it
    return json.dumps(data[0]).encode() + b"\n"


@pytest.mark.parametrize(
    "name", [name for name, parser in PARSERS.items() if parser.name.endswith((".json", ".jsonl"))]
)
def test_altered_json_is_read_or_refused_cleanly(name):
    parser = PARSERS[name]

    @settings(QUICK, max_examples=60)
    @given(altered(parser.example()))
    def check(content):
        refuses_cleanly(parser, content)

    check()
