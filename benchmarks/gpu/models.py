"""Model folders for benchmarks: the true shapes of Qwen3, no weights (`--load-format dummy` fills them), a tokenizer.

The tokenizer is the demo model's with plain tokens added up to the model's vocabulary: every token id has a text of a
few characters, so detokenizing costs what it costs with a real vocabulary. What the text says means nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.shapes import QWEN3_32B, QWEN3_600M, Shape

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
QWEN3_8B = Shape("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936)
REHEARSAL = Shape("rehearsal", 2, 64, 96, 4, 2, 16, 5000)
MODELS = {shape.name: shape for shape in (QWEN3_32B, QWEN3_8B, QWEN3_600M, REHEARSAL)}
TIED = {QWEN3_600M.name, REHEARSAL.name}
CONTEXT = 40960


def config_of(shape: Shape) -> dict[str, Any]:
    """config.json as the published checkpoints have it, as far as it bears on the shape."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "dtype": "bfloat16",
        "eos_token_id": _added("<|im_end|>"),
        "head_dim": shape.dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": shape.name in TIED,
        "vocab_size": shape.vocab,
    }


def _added(content: str) -> int:
    added = json.loads((DEMO / "tokenizer.json").read_text())["added_tokens"]
    return next(int(token["id"]) for token in added if token["content"] == content)


def pad_tokenizer(tokenizer: dict[str, Any], vocab_size: int) -> None:
    """Give every id below `vocab_size` that has no text one: a word of four letters, which no merge makes.

    The added tokens go into the vocabulary too: the library numbers anew those that are not there and do not follow it.
    """
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    vocab |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    known = set(vocab.values())
    words = (text for letters in product(ascii_lowercase, repeat=4) if (text := "Ġ" + "".join(letters)) not in vocab)
    for token in range(vocab_size):
        if token not in known:
            vocab[next(words)] = token


def write_folder(shape: Shape, folder: Path) -> None:
    """config.json and the tokenizer of `shape`, in an existing folder."""
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=1) + "\n")
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    pad_tokenizer(tokenizer, shape.vocab)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, folder / name)


@contextmanager
def model_folder(name: str) -> Iterator[str]:
    """A temporary folder of the model called `name`, removed at the end."""
    with TemporaryDirectory(prefix="diptych-model-") as folder:
        write_folder(MODELS[name], Path(folder))
        yield folder
