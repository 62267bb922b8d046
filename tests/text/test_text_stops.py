"""Stop strings: the same whatever the pieces, nothing held back that cannot become a stop."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.text.stops import StopMatcher

ALPHABET = st.text("ab\n", max_size=40)


def naive(text: str, stops: list[str], keep: bool) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if keep else end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(ALPHABET, max_size=6),
    st.booleans(),
)
def test_equals_the_definition(stops: list[str], pieces: list[str], keep: bool) -> None:
    matcher = StopMatcher(stops, keep_stop=keep)
    out = []
    for piece in pieces:
        out.append(matcher.push(piece))
        if matcher.matched is not None:
            break
    shown = "".join(out) + ("" if matcher.matched else matcher.finish())
    assert (shown, matcher.matched) == naive("".join(pieces), stops, keep)


def test_holds_back_only_what_may_become_a_stop() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("hello") == "hello"
    assert matcher.push(" you\n") == " you"
    assert matcher.push("x") == "\nx"
    assert matcher.push("\n\nUs") == ""
    assert matcher.push("e!") == "\n\nUse!"
    assert matcher.push("a\n\nUser: more") == "a"
    assert matcher.matched == "\n\nUser:"
    assert matcher.push("late") == ""


def test_without_stops_nothing_is_held() -> None:
    matcher = StopMatcher([])
    assert matcher.push("abc") == "abc"
    assert matcher.finish() == ""
