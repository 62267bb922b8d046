"""Settings of one server, and the flags that set them. Names are SGLang's where SGLang has the setting.

A flag that is not in the table is refused by name (flags.py adds advice); nothing is ignored. Values are checked once,
here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from dataclasses import Field, dataclass, field, fields, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from diptych.errors import ConfigError
from diptych.flags import explain

Flags = tuple[str, ...]

ANYWHERE = "any"
# Loopback, and the private networks of RFC 1918 and RFC 4193; not link-local ones: clouds give credentials there.
PRIVATE = ("127.0.0.0/8", "::1", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")


MOST_CAPTURED = 256  # rows; a step of more is long enough that launching its kernels one by one costs little

# What 0 means, by device. A step of a GPU costs the same for few rows as for many, and its kernels like long pages.
BY_DEVICE = {
    "cpu": {"page_size": 16, "max_running_requests": 64, "chunked_prefill_size": 512},
    "cuda": {"page_size": 64, "max_running_requests": 256, "chunked_prefill_size": 8192},
}
ALSO_BY_DEVICE = ("device", "attention_backend", "cuda_graph_max_bs")
# Settings that only a GPU has a use for: the value that leaves them alone.
GPU_ONLY = {"base_gpu_id": 0, "mem_fraction_static": 0.0, "cuda_graph_max_bs": 0, "disable_cuda_graph": False}


def flag(default: Any, help: str, *names: str, choices: Flags | None = None, parse: Any = None) -> Any:
    """A setting with its flags. `names` empty: `--` + the field's name with dashes."""
    metadata = {"help": help, "names": names, "choices": choices, "parse": parse}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything `diptych serve` can be told. Sizes in tokens unless the name says otherwise; times in seconds."""

    # what is served
    model_path: str = flag(
        "",
        "folder with config.json, *.safetensors and tokenizer.json (required); nothing is downloaded",
        "--model-path",
        "--model",
    )
    served_model_name: str = flag("", "name shown to clients (default: the model path without a trailing slash)")
    tokenizer_path: str = flag("", "folder with tokenizer.json (default: the model path)")
    chat_template: str = flag("", "file with a Jinja chat template (default: the model's own)")
    load_format: str = flag(
        "auto", "where weights come from; dummy fills uniform(-1e-3, 1e-3)", choices=("auto", "safetensors", "dummy")
    )
    model_impl: str = flag(
        "auto",
        "diptych: our own Qwen3 and Llama; transformers: any causal model that library knows",
        choices=("auto", "diptych", "transformers"),
    )
    dtype: str = flag(
        "auto",
        "type of weights and activations; auto: float32 on a CPU, the checkpoint's on a GPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    context_length: int = flag(0, "longest sequence served (default: the model's max_position_embeddings)")
    # where
    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(30000, "port to listen on; 0 lets the kernel choose")
    device: str = flag("auto", "auto: cuda when there is one", choices=("auto", "cpu", "cuda"))
    base_gpu_id: int = flag(0, "the first of the GPUs that the ranks take, one each, of those that are visible")
    tp_size: int = flag(
        1, "tensor parallel size: engine processes that share each layer", "--tp", "--tp-size", "--tensor-parallel-size"
    )
    pp_size: int = flag(
        1,
        "pipeline parallel size: stages that hold a run of layers each, of --tp engine processes; makes room for "
        "larger models rather than speed: only chunks of prompts overlap, steps that sample wait for all stages",
        "--pp-size",
        "--pipeline-parallel-size",
    )
    cpu_threads: int = flag(1, "torch threads of one engine process on a CPU")
    # memory and scheduling
    page_size: int = flag(0, "tokens a KV page holds; 0: 64 on a GPU, 16 on a CPU; both halves of a pair need the same")
    mem_fraction_static: float = flag(
        0.0,
        "part of a GPU's memory for weights and KV pool together, above 0 and below 1; 0: all but what a step needs "
        "besides, which is reckoned from the model's shapes",
    )
    max_total_tokens: int = flag(
        0,
        "tokens the KV pool holds; 0: on a GPU as many as --mem-fraction-static leaves room for, on a CPU what 256 MiB "
        "hold, at least one context",
    )
    kv_cache_dtype: str = flag(
        "auto",
        "type of keys and values in the KV pool; auto: that of the weights; both halves of a pair need the same",
        choices=("auto", "bfloat16", "float16", "float32", "fp8_e4m3"),
    )
    max_running_requests: int = flag(0, "sequences that decode together at most; 0: 256 on a GPU, 64 on a CPU")
    max_queued_requests: int = flag(4096, "requests that may wait; beyond that 429")
    chunked_prefill_size: int = flag(
        0,
        "prompt tokens computed in one step at most; 0: 8192 on a GPU, 512 on a CPU; -1: no limit, on a CPU only",
    )
    schedule_policy: str = flag(
        "fcfs", "who is admitted next: first come, or longest cached prefix", choices=("fcfs", "lpm")
    )
    disable_radix_cache: bool = flag(False, "do not keep finished prompts' KV for reuse")
    # how steps run
    attention_backend: str = flag(
        "auto",
        "who computes attention: our Triton kernels, or torch alone; auto: triton on a GPU, torch on a CPU",
        choices=("auto", "triton", "torch"),
    )
    cuda_graph_max_bs: int = flag(
        0,
        f"sequences of the largest steps that are captured as CUDA graphs; 0: --max-running-requests, but at "
        f"most {MOST_CAPTURED}; none is with --pp-size above 1, nor with --attention-backend torch",
    )
    disable_cuda_graph: bool = flag(False, "launch each kernel of a step by itself")
    disable_overlap_schedule: bool = flag(False, "plan a step only when the one before it is done")
    deterministic: bool = flag(
        False,
        "answers that do not depend on what else is in the batch, bit for bit: on a GPU, kernels with fixed splits and "
        "tiles only; a CPU uses no others anyway",
        "--deterministic",
        "--enable-deterministic-inference",
    )
    # answers
    sampling_defaults: str = flag(
        "model",
        "where missing sampling values come from: the model's generation_config.json, or OpenAI's constants",
        choices=("model", "openai"),
    )
    reasoning_parser: str = flag(
        "", "split <think> text into reasoning_content", choices=("", "qwen3", "qwen3-thinking", "deepseek-r1")
    )
    tool_call_parser: str = flag("", "turn tool call text into tool_calls", choices=("", "qwen", "qwen25", "hermes"))
    default_chat_template_kwargs: dict[str, Any] = flag(
        {}, "JSON object of template variables used when a request has none", parse=_json_object
    )
    grammar_backend: str = flag(
        "llguidance",
        "engine for response_format, json_schema, regex and ebnf; none refuses them",
        choices=("llguidance", "none"),
    )
    enable_cache_report: bool = flag(False, "report cached tokens in usage.prompt_tokens_details")
    # disaggregation
    disaggregation_mode: str = flag("null", "null: this server does both phases", choices=("null", "prefill", "decode"))
    disaggregation_bootstrap_port: int = flag(
        8998, "port of a prefill server's bootstrap service; 0 lets the kernel choose"
    )
    disaggregation_transfer_backend: str = flag(
        "auto",
        "how KV pages travel; auto: from GPU to GPU or through shared memory on one host, else TCP; nixl: straight "
        "from pool to pool over RDMA, NVLink or TCP (pip install 'diptych[nixl]')",
        choices=("auto", "cuda", "shm", "tcp", "nixl", "fake"),
    )
    disaggregation_decode_enable_radix_cache: bool = flag(
        False, "let a decode server keep and reuse prefixes; prefill then sends only the rest"
    )
    num_reserved_decode_tokens: int = flag(
        512, "tokens a decode server keeps free for each running request when it admits another"
    )
    disaggregation_bootstrap_timeout: float = flag(
        300.0,
        "longest wait for the other side of a hand-over, or for its next step, in seconds; a hand-over with all its "
        "queues may take six times as long",
    )
    disaggregation_heartbeat_timeout: float = flag(
        5.0, "silence after which the other side of a hand-over counts as dead, in seconds"
    )
    disaggregation_secret_file: str = flag(
        "", "file with the secret both sides of a hand-over must know (or env DIPTYCH_PD_SECRET)"
    )
    disaggregation_bootstrap_allow: str = flag(
        "",
        "where a decode server may look for prefill servers: networks (10.0.0.0/8), addresses, names, *.names or any, "
        "separated by commas (default: any with a secret, else loopback and private addresses)",
    )
    # edges
    api_key: str = flag("", "bearer key for the inference endpoints (or env DIPTYCH_API_KEY)")
    admin_api_key: str = flag(
        "", "bearer key for /drain, /flush_cache, /abort_request ...; set: api-key no longer opens them"
    )
    enable_metrics: bool = flag(False, "serve Prometheus metrics on /metrics")
    metrics_prefix: str = flag("sglang:", "prefix of the metrics' names")
    drain_timeout: float = flag(120.0, "longest wait for running requests after SIGTERM or /drain, in seconds")
    watchdog_timeout: float = flag(300.0, "a step longer than this ends the server, in seconds")
    random_seed: int = flag(0, "seed of the dummy weights, and of seeds drawn for requests without one (0: random)")
    log_level: str = flag("info", "lowest level that is logged", choices=("debug", "info", "warning", "error"))

    @property
    def pd_secret(self) -> str:
        """The shared secret of the hand-over, "" when none is set. Raises ConfigError if its file cannot be read."""
        if not self.disaggregation_secret_file:
            return os.environ.get("DIPTYCH_PD_SECRET", "")
        try:
            return Path(self.disaggregation_secret_file).read_text().strip()
        except OSError as error:
            raise ConfigError(f"--disaggregation-secret-file: cannot read it ({error.strerror})") from None

    @property
    def bootstrap_places(self) -> tuple[str, ...]:
        """What a request's bootstrap_host may name. With a secret the other side must prove itself, wherever it is."""
        given = tuple(item.strip() for item in self.disaggregation_bootstrap_allow.split(",") if item.strip())
        return given or ((ANYWHERE,) if self.pd_secret else PRIVATE)

    @property
    def num_ranks(self) -> int:
        """Engine processes of this server: rank = stage * tp_size + place in the stage."""
        return self.tp_size * self.pp_size

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model_path.rstrip("/") or "/"

    def check(self) -> None:
        """Raise ConfigError, naming the flag, for values that cannot work together."""
        if not self.model_path:
            raise ConfigError("--model-path is required: a folder with config.json, *.safetensors and tokenizer.json")
        at_least_one = ("tp_size", "pp_size", "cpu_threads", "max_queued_requests")
        not_negative = (
            "context_length",
            "base_gpu_id",
            "page_size",
            "max_total_tokens",
            "max_running_requests",
            "cuda_graph_max_bs",
            "num_reserved_decode_tokens",
            "drain_timeout",
        )
        for name, low in [*((name, 1) for name in at_least_one), *((name, 0) for name in not_negative)]:
            if not low <= getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(self, name)}")
        for name in ("disaggregation_bootstrap_timeout", "disaggregation_heartbeat_timeout", "watchdog_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} must be a number of seconds above 0")
        if self.chunked_prefill_size < -1:
            raise ConfigError(
                f"--chunked-prefill-size must be positive, 0 for the device's default or -1 for no limit, "
                f"not {self.chunked_prefill_size}"
            )
        if not 0 <= self.mem_fraction_static < 1:
            raise ConfigError(f"--mem-fraction-static must be above 0 and below 1, not {self.mem_fraction_static}")
        if 0 < self.max_total_tokens < self.page_size:
            raise ConfigError(f"--max-total-tokens {self.max_total_tokens} is less than a page of {self.page_size}")
        for name in ("port", "disaggregation_bootstrap_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"--{name.replace('_', '-')} must be a port number, not {getattr(self, name)}")
        for item in self.disaggregation_bootstrap_allow.split(","):
            if item.strip() and not is_network(item.strip()) and not _is_name(item.strip()):
                raise ConfigError(f"--disaggregation-bootstrap-allow: {item.strip()} is no network, address or name")
        if self.device == "cpu":
            self._check_cpu()
        elif self.device == "cuda":
            self._check_gpu()

    def _check_gpu(self) -> None:
        if self.chunked_prefill_size == -1:
            raise ConfigError("--chunked-prefill-size -1 bounds no step's memory on a GPU; give a number of tokens")
        if self.cuda_graph_max_bs and (why := self._graphless()):
            raise ConfigError(f"--cuda-graph-max-bs: with {why} no step is captured; leave one of them out")
        if self.deterministic and self.attention_backend == "torch":
            raise ConfigError("--deterministic needs our kernels on a GPU: leave --attention-backend torch out")

    def _graphless(self) -> str:
        """The flag that rules CUDA graphs out, or ""."""
        if self.disable_cuda_graph:
            return "--disable-cuda-graph"
        if self.attention_backend == "torch":
            return "--attention-backend torch"
        return f"--pp-size {self.pp_size}" if self.pp_size > 1 else ""

    def _check_cpu(self) -> None:
        for name, default in GPU_ONLY.items():
            if getattr(self, name) != default:
                raise ConfigError(f"--{name.replace('_', '-')} is for a GPU; on a CPU leave it out")
        if self.attention_backend == "triton":
            raise ConfigError("--attention-backend triton needs a GPU; on a CPU use torch, or leave it out")
        if self.kv_cache_dtype == "fp8_e4m3":
            raise ConfigError("--kv-cache-dtype fp8_e4m3 needs a GPU; on a CPU use auto, or leave it out")

    def on_device(self, device: str) -> ServerConfig:
        """These settings with what depends on the device ("cpu" or "cuda") filled in; a second call changes nothing.

        Raises ConfigError for what this device cannot do.
        """
        filled: dict[str, Any] = {name: getattr(self, name) or value for name, value in BY_DEVICE[device].items()}
        filled["device"] = device
        if self.attention_backend == "auto":
            filled["attention_backend"] = "triton" if device == "cuda" else "torch"
        if device == "cuda" and not self._graphless():
            rows = filled["max_running_requests"]
            filled["cuda_graph_max_bs"] = min(self.cuda_graph_max_bs or MOST_CAPTURED, rows)
        config = replace(self, **filled)
        config.check()
        return config

    @property
    def of_device(self) -> dict[str, Any]:
        """The settings that `on_device` fills in, by name: what an engine tells its API process."""
        return {name: getattr(self, name) for name in (*BY_DEVICE["cpu"], *ALSO_BY_DEVICE)}


def is_network(text: str) -> bool:
    """Whether `text` is a network in CIDR form, or an address."""
    try:
        ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def _is_name(text: str) -> bool:
    """A host name, perhaps with `*.` in front of it; numbers alone are an address that is none."""
    return re.fullmatch(r"(\*\.)?(?![0-9.]*$)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", text) is not None


def flag_names(item: Field[Any]) -> Flags:
    names: Flags = item.metadata["names"]
    return names or (f"--{item.name.replace('_', '-')}",)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        if "'mooncake'" in message:
            message += "; tcp reaches any host, nixl uses RDMA"
        raise ConfigError(message)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Put a flag for every field of ServerConfig on `parser`; each help text ends with the default."""
    for item in fields(ServerConfig):
        meta = item.metadata
        names = flag_names(item)
        default = {} if item.name == "default_chat_template_kwargs" else item.default
        shown = "" if default in ("", {}, False) else f" (default: {default})"
        if isinstance(default, bool):
            parser.add_argument(*names, dest=item.name, action="store_true", help=meta["help"])
            continue
        kind = meta["parse"] or type(default)
        parser.add_argument(
            *names, dest=item.name, type=kind, default=default, choices=meta["choices"], help=meta["help"] + shown
        )


def parse_server_args(argv: list[str]) -> ServerConfig:
    """Flags to settings. Raises ConfigError that names an unknown flag or a bad value; `--help` prints and exits 0."""
    parser = _Parser(
        prog="diptych serve", description="Serve one model: both phases, or one of them.", allow_abbrev=False
    )
    add_server_flags(parser)
    names = {name for item in fields(ServerConfig) for name in flag_names(item)} | {"--help"}
    # Values never begin with dashes, so this needs no parser, which would stop at its first complaint.
    words = (word.partition("=")[0] for word in argv if word.startswith("--") and word != "--")
    if unknown := [word for word in words if word not in names]:
        raise ConfigError(f"{explain(unknown, names)}; `diptych serve --help` lists what is supported")
    known, left = parser.parse_known_args(argv)
    if left:
        raise ConfigError(f"{left[0]} belongs to no flag; the model's folder goes with --model-path")
    config = ServerConfig(**vars(known))
    config.check()
    return config
