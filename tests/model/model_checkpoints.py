"""Small random checkpoints, written by transformers, and that library's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model_driver import VOCAB
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 7,
    "initializer_range": 0.25,
}


def qwen3(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**{**SMALL, **changes})


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SMALL, **changes})


def write(folder: Path, config: PreTrainedConfig, seed: int = 0, **save: Any) -> PreTrainedModel:
    """A random model of this shape, saved to `folder` and returned, in float32; norms and biases are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder, **save)
    return model


@torch.no_grad()
def reference_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """`[len(tokens), vocab]`, on the model's device."""
    return model(torch.tensor([tokens], device=model.device)).logits[0]


@torch.no_grad()
def reference_greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int, **settings: Any) -> list[int]:
    """Greedy tokens by the library's own generate, whatever the end-of-sequence ids are. `settings`: generate's."""
    inputs = torch.tensor([prompt], device=model.device)
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    return out[0, len(prompt) :].tolist()
