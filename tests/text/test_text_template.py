"""Chat templates: as transformers renders them; closed to clients; errors are the client's to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diptych.errors import BadRequest, ConfigError
from diptych.text.template import MAX_PROMPT_CHARS, ChatTemplate
from diptych.text.tokenizer import Tokenizer

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "é <b>", "parameters": {"type": "object"}}}
]
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]] = [
    (HI, None, {}),
    (HI, None, {"enable_thinking": False}),
    ([{"role": "system", "content": "Be brief."}, *HI], TOOLS, {}),
    (
        [
            *HI,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
            },
            {"role": "tool", "content": "sunny"},
        ],
        TOOLS,
        {"enable_thinking": True},
    ),
    (
        [*HI, {"role": "assistant", "content": "<think>\nx\n</think>\n\nhello"}, {"role": "user", "content": "go on"}],
        None,
        {},
    ),
]


def make(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"eos_token": "</s>"})


@pytest.mark.parametrize("case", range(len(CONVERSATIONS)))
def test_same_text_as_transformers(demo: Tokenizer, case: int) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, tools, kwargs = CONVERSATIONS[case]
    assert demo.chat_template is not None
    expected, _ = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=demo.chat_template,
        add_generation_prompt=True,
        **demo.special,
        **kwargs,
    )
    ours = ChatTemplate(demo.chat_template, demo.special)
    assert ours.render(messages, tools=tools, kwargs=kwargs) == expected[0]


def test_continue_the_final_message(demo: Tokenizer) -> None:
    assert demo.chat_template is not None
    ours = ChatTemplate(demo.chat_template, demo.special)
    prompt = ours.render([*HI, {"role": "assistant", "content": "The answer is "}], continue_final=True)
    assert prompt.endswith("<|im_start|>assistant\nThe answer is ")


def test_tojson_keeps_html_and_unicode() -> None:
    assert make("{{ tools | tojson }}").render(HI, tools=[{"a": "<é>"}]) == json.dumps(
        [{"a": "<é>"}], ensure_ascii=False
    )


def test_helpers_exist() -> None:
    source = (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% break %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ eos_token }}"
    )
    assert make(source).render(HI * 3) == "x4</s>"


def test_generation_blocks_are_shown() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!"
    assert make(source).render(HI * 2) == "hihi!"


def test_the_template_refuses() -> None:
    with pytest.raises(BadRequest, match="roles must alternate") as caught:
        make("{{ raise_exception('roles must alternate') }}").render(HI)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "name", ["messages", "tools", "chat_template", "tokenize", "add_generation_prompt", "eos_token", "__class__"]
)
def test_clients_cannot_set_what_is_ours(name: str) -> None:
    with pytest.raises(BadRequest, match=name):
        make("{{ messages }}").check_kwargs({name: True})


def test_only_variables_that_the_template_reads_reach_it() -> None:
    template = make("{{ enable_thinking }}{{ other is defined }}")
    assert template.variables == {"enable_thinking", "other"}
    assert template.render(HI, kwargs={"enable_thinking": 1, "unknown": 2}) == "1False"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'x': 1}) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ ('%s' | attr('format')).__globals__ }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_escapes_from_the_sandbox_fail(source: str) -> None:
    messages = [dict(HI[0])]
    try:
        shown = make(source).render(messages)
    except BadRequest:
        shown = ""
    assert "os" not in shown and "<module" not in shown and "<class" not in shown
    assert messages == HI


def test_size_is_limited() -> None:
    with pytest.raises(BadRequest, match="characters"):
        make("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}").render(
            [{"role": "user", "content": "x" * (MAX_PROMPT_CHARS // 50_000)}]
        )


def test_bad_jinja_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="line 1"):
        make("{% if %}")


def test_missing_data_is_the_clients_error() -> None:
    with pytest.raises(BadRequest, match="cannot show"):
        make("{{ messages[0].content + 1 }}").render(HI)


def test_the_models_template_is_found(tmp_path: Path, demo: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text(demo.backend.to_str())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "chat_template": [{"name": "default", "template": "A"}]})
    )
    loaded = Tokenizer.load(str(tmp_path))
    assert (loaded.chat_template, loaded.special) == ("A", {"eos_token": "<|im_end|>"})
    (tmp_path / "chat_template.jinja").write_text("B")
    assert Tokenizer.load(str(tmp_path)).chat_template == "B"
    (tmp_path / "own.jinja").write_text("C")
    assert Tokenizer.load(str(tmp_path), str(tmp_path / "own.jinja")).chat_template == "C"


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        Tokenizer.load(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokenizer.load(str(tmp_path))


def test_least_tokens(demo: Tokenizer) -> None:
    for text in ("", "a", "hello world " * 50, " " * 500, "e\u0301" * 100, "😀" * 40, "<|object_ref_start|>" * 9):
        assert demo.least_tokens(text) <= len(demo.encode(text, special=False))
    assert demo.least_tokens("a" * 1_000_000) > 8192


def test_tokenizer_of_another_model(demo: Tokenizer) -> None:
    demo.check_model(4096)
    demo.check_model(5000)
    with pytest.raises(ConfigError, match="another model"):
        demo.check_model(4095)


def test_half_a_surrogate_pair(demo: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="Unicode"):
        demo.encode("a\ud800b", special=False)
