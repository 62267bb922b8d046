"""The prompt's logprobs move from prefill's answer into decode's."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import UpstreamError
from diptych.router.logprobs import StreamMerger, merge


def generated(inputs, outputs=(), index=None):
    meta = {"id": "x", "output_token_logprobs": list(outputs), "input_token_logprobs": inputs}
    return {"text": "t", "meta_info": meta} | ({} if index is None else {"index": index})


def merged(prefill, decode):
    return json.loads(merge(json.dumps(prefill).encode(), json.dumps(decode).encode()))


PROMPT = [[None, 1, None], [-0.5, 2, None]]


@pytest.mark.parametrize("own", [[], None])
def test_generate(own):
    found = merged(generated(PROMPT, [[-9, 9, None]]), generated(own, [[-0.1, 3, None]]))
    assert found["meta_info"]["input_token_logprobs"] == PROMPT
    assert found["meta_info"]["output_token_logprobs"] == [[-0.1, 3, None]]


def test_lists_decode_has_are_kept_behind():
    assert merged(generated(PROMPT), generated([[-1.0, 7, None]]))["meta_info"]["input_token_logprobs"] == [
        *PROMPT,
        [-1.0, 7, None],
    ]


def test_top_and_chosen_tokens_move_too():
    prefill = {
        "meta_info": {"input_top_logprobs": [None, [[-1.0, 2, None]]], "input_token_ids_logprobs": [[[-3.0, 5, None]]]}
    }
    found = merged(prefill, {"meta_info": {"input_top_logprobs": []}})["meta_info"]
    assert found == prefill["meta_info"]


def test_a_batch_goes_item_by_item():
    found = merged([generated([[None, 1, None]]), generated([[None, 2, None]])], [generated([]), generated([])])
    assert [item["meta_info"]["input_token_logprobs"] for item in found] == [[[None, 1, None]], [[None, 2, None]]]


def test_answers_that_do_not_fit_are_an_error():
    for prefill, decode in (([generated([])], generated([])), ([], [generated([])])):
        with pytest.raises(UpstreamError):
            merged(prefill, decode)
    with pytest.raises(UpstreamError):
        merge(b"oops", b"{}")


def echoed(tokens, logprobs, index=0):
    fields = {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": None,
        "text_offset": list(range(len(tokens))),
    }
    return {"index": index, "text": "".join(tokens), "logprobs": fields}


def test_echo_of_completions_where_decode_lists_only_its_own_tokens():
    prefill = {"choices": [echoed(["a", "b", "x"], [None, -0.5, -0.1])]}
    decode = {"choices": [echoed(["x", "y"], [-0.1, -0.2])]}
    found = merged(prefill, decode)["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "b", "x", "y"] and found["token_logprobs"] == [None, -0.5, -0.1, -0.2]


def test_echo_of_completions_where_decode_lists_the_prompt_without_logprobs():
    prefill = {"choices": [echoed(["a", "b", "x"], [None, -0.5, -0.1])]}
    decode = {"choices": [echoed(["a", "b", "x", "y"], [None, None, -0.1, -0.2])]}
    found = merged(prefill, decode)["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "b", "x", "y"] and found["token_logprobs"] == [None, -0.5, -0.1, -0.2]


def test_echo_without_new_tokens():
    found = merged({"choices": [echoed(["a", "b"], [None, -0.5])]}, {"choices": [echoed(["a", "b"], [None, None])]})
    assert found["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5]


def sse(*items):
    return b"".join(b"data: " + json.dumps(item).encode() + b"\n\n" for item in items) + b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_streams_whatever_their_parts(size):
    prefill = sse(generated([[None, 1, None]], index=0), generated([[None, 2, None]], index=1))
    decode = sse(generated([], index=1), generated([], index=0), generated([], index=1))
    merger = StreamMerger(prefill, limit=1 << 20)
    out = b"".join(merger.feed(decode[i : i + size]) for i in range(0, len(decode), size)) + merger.rest()
    assert out == sse_compact(
        generated([[None, 2, None]], index=1),
        generated([[None, 1, None]], index=0),
        generated([[None, 2, None]], index=1),
    )


def sse_compact(*items):
    texts = [json.dumps(item, separators=(",", ":")).encode() for item in items]
    return b"".join(b"data: " + text + b"\n\n" for text in texts) + b"data: [DONE]\n\n"


def test_streamed_echo_comes_once():
    merger = StreamMerger(sse({"choices": [echoed(["a", "x"], [None, -0.1])]}), limit=1 << 20)
    first = json.loads(merger.feed(sse({"choices": [echoed(["x"], [-0.1])]}))[6:].split(b"\n\n")[0])
    second = json.loads(merger.feed(sse({"choices": [echoed(["y"], [-0.2])]}))[6:].split(b"\n\n")[0])
    assert first["choices"][0]["logprobs"]["tokens"] == ["a", "x"]
    assert second["choices"][0]["logprobs"]["tokens"] == ["y"]


def test_comments_and_broken_ends_pass_as_they_are():
    merger = StreamMerger(sse(generated(PROMPT)), limit=1 << 20)
    assert merger.feed(b": ping\n\ndata: {") == b": ping\n\n"
    assert merger.rest() == b"data: {"


odd = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("index", "meta_info", "choices", "logprobs", "token_logprobs", "tokens"))
            | st.sampled_from(("input_token_logprobs", "top_logprobs", "text_offset")),
            inner,
            max_size=4,
        )
    ),
    max_leaves=16,
)


@settings(max_examples=400, deadline=None)
@given(odd, odd)
def test_whatever_servers_answer_is_merged_or_refused(prefill, decode):
    for theirs, ours in ((prefill, decode), ({"choices": [prefill]}, {"choices": [decode]})):
        try:
            merged(theirs, ours)
        except UpstreamError:
            continue
    merger = StreamMerger(sse(prefill, {"choices": [prefill]}), limit=1000)
    merger.feed(sse(decode, {"choices": [decode]}))
    with pytest.raises(UpstreamError):
        StreamMerger(b"data: {", limit=1000)
    with pytest.raises(UpstreamError):
        merge(b"[" * 100_000, b"{}")


def test_an_event_without_end_is_not_kept_for_ever():
    merger = StreamMerger(b"", limit=100)
    assert merger.feed(b"data: 1\n\ndata: " + b"x" * 94) == b"data: 1\n\n"
    with pytest.raises(UpstreamError, match="--max-payload-size"):
        merger.feed(b"x")
