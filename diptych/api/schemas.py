"""Bodies of requests, as clients write them. Types are checked here, ranges where the values are used.

Unknown fields are ignored, as OpenAI-compatible servers do, unless one is nearly the name of a field; in /generate's
sampling_params they are refused, as SGLang does. Fields that SGLang or vLLM knows, that would change the answer and
that we do not have are refused when they are set: an answer that ignores them would be wrong.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType

from diptych.errors import BadRequest

Host = str | list[str | None] | None | UnsetType
Number = int | list[int | None] | None | UnsetType


class Pairing(Protocol):
    """Where prefill happens: one value for all sequences, or a list with one each."""

    bootstrap_host: Host
    bootstrap_port: Number
    bootstrap_room: Number


class SamplingFields(Struct, kw_only=True):
    """What OpenAI's and the native endpoints call by the same name. None: the default."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    logit_bias: dict[int, float] | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | dict[str, Any] | None = None
    # not supported
    stop_regex: Any = None
    structural_tag: Any = None
    beam_width: Any = None
    custom_params: Any = None
    custom_logit_processor: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: Any = None
    guided_decoding_backend: Any = None
    structured_outputs: Any = None


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Struct):
    schema: dict[str, Any] | bool | None = None
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    type: str
    json_schema: JsonSchemaFormat | None = None


class OpenAIFields(SamplingFields, kw_only=True):
    """What chat and text completions share."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    rid: str | list[str] | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    bootstrap_host: Host = UNSET
    bootstrap_port: Number = UNSET
    bootstrap_room: Number = UNSET
    # not supported
    priority: Any = None
    lora_path: Any = None
    session_params: Any = None
    return_hidden_states: Any = None


class ToolFunction(Struct):
    name: str
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    function: ToolFunction
    type: str = "function"


class ToolChoiceFunction(Struct):
    name: str


class ToolChoice(Struct):
    function: ToolChoiceFunction
    type: str = "function"


class ChatBody(OpenAIFields, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # not supported
    functions: Any = None
    function_call: Any = None
    audio: Any = None


class CompletionBody(OpenAIFields, kw_only=True):
    prompt: str | list[int | str | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class NativeSampling(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    sampling_seed: int | None = None
    # SGLang's, and without effect here: fast tokenizers know no such spaces, and each step is a frame
    spaces_between_special_tokens: bool | None = None
    stream_interval: int | None = None


class GenerateBody(Struct, kw_only=True):
    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: list[int | list[int] | None] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    bootstrap_host: Host = UNSET
    bootstrap_port: Number = UNSET
    bootstrap_room: Number = UNSET
    # not supported
    priority: Any = None
    input_embeds: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    lora_path: Any = None
    session_params: Any = None
    custom_logit_processor: Any = None
    return_hidden_states: Any = None


_UNSUPPORTED = {
    **dict.fromkeys(
        (
            "stop_regex",
            "structural_tag",
            "beam_width",
            "custom_params",
            "custom_logit_processor",
            "priority",
            "lora_path",
            "session_params",
            "return_hidden_states",
            "functions",
            "function_call",
            "audio",
            "input_embeds",
            "image_data",
            "video_data",
            "audio_data",
            "guided_whitespace_pattern",
            "guided_decoding_backend",
        ),
        "leave it out",
    ),
    "guided_json": "use json_schema or, in OpenAI's bodies, response_format",
    "guided_regex": "use regex",
    "guided_choice": "use regex, with | between the choices",
    "guided_grammar": "use ebnf",
    "structured_outputs": "use json_schema, regex or ebnf or, in OpenAI's bodies, response_format",
}


def refuse_unsupported(body: Struct, prefix: str = "") -> None:
    """Raise BadRequest for a field that is set and that this server does not have."""
    for name, advice in _UNSUPPORTED.items():
        if getattr(body, name, None) not in (None, False, [], {}, ""):
            raise BadRequest(f"{prefix}{name} is not supported by this server; {advice}", param=f"{prefix}{name}")


class Usage(msgspec.Struct):
    """Token counts, keys in the order in which they are written."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: dict[str, int] | None = None
