"""Stop strings in a text that comes in pieces, against the naive way: put the pieces together, then look."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.detokenize import StopScanner, StopStrings


def naive_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """What stands before the stop string that is complete first; of two that end together, the longer one."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
def test_stops_are_found_as_naively(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(StopStrings(stops))
    out = "".join(scanner.push(piece) for piece in pieces) + scanner.flush()
    assert (out, scanner.is_stopped) == naive_stop("".join(pieces), stops)


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
def test_only_a_possible_stop_is_held_back(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(StopStrings(stops))
    sent = "".join(scanner.push(piece) for piece in pieces)
    if not scanner.is_stopped:
        text = "".join(pieces)
        ends = [length for stop in stops for length in range(len(stop)) if text.endswith(stop[:length])]
        assert sent == text[: len(text) - max(ends, default=0)]


@given(
    st.lists(st.tuples(st.text("ab", max_size=4), st.booleans()), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.booleans(),
)
def test_stops_count_only_where_they_may(pieces: list[tuple[str, bool]], stops: list[str], are_shown: bool) -> None:
    """They may begin where they must not end."""
    text, may = "".join(piece for piece, _ in pieces), [may for piece, may in pieces for _ in piece]
    found = ((end, [stop for stop in stops if text[:end].endswith(stop)]) for end in range(1, len(text) + 1) if may[end - 1])
    want = next(((text[: end if are_shown else end - max(map(len, ended))], True) for end, ended in found if ended), (text, False))
    scanner = StopScanner(StopStrings(stops, are_shown))
    out = "".join(scanner.push(piece, may) for piece, may in pieces) + scanner.flush()
    assert (out, scanner.is_stopped) == want


def test_a_long_stop_string_costs_no_more() -> None:
    scanner = StopScanner(StopStrings(["a" * 50_000 + "b"]))
    assert "".join(scanner.push("a" * 100) for _ in range(2000)) == "a" * 150_000
