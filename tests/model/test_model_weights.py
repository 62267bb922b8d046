"""Reading weights: what is refused and how it is said, shards, slices, made-up weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoints import llama, qwen3, write
from model_driver import Driver, Sequence, prompt_of
from safetensors.torch import load_file, save_file

from diptych.config import ServerConfig
from diptych.errors import ConfigError
from diptych.model import upload, weights
from diptych.model.config import load_model_config
from diptych.model.decoder import Decoder
from diptych.model.noise import hash_text, uniform
from diptych.model.parallel import Parallel
from diptych.model.runner import Runner
from diptych.model.weights import DummySource, SafetensorsSource, UploadedSource


def start(folder: Path | str, **changes: Any) -> Runner:
    return Runner(ServerConfig(model_path=str(folder), device="cpu", **{"max_total_tokens": 512, **changes}))


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, drop: str = "", **add: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(drop, None)
    save_file({**tensors, **add}, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, qwen3())
    return tmp_path


def test_shards_give_what_one_file_gives(folder: Path) -> None:
    whole = start(folder)
    prompt = prompt_of(30)
    expected = Driver(whole, 16).generate(Sequence(prompt), 8)
    (folder / "model.safetensors").unlink()
    write(folder, qwen3(), max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    sharded = start(folder)
    assert Driver(sharded, 16).generate(Sequence(prompt), 8) == expected
    assert sharded.info.num_parameters == whole.info.num_parameters
    assert sharded.info.weight_bytes == 4 * sharded.info.num_parameters


def test_the_fingerprint_tells_checkpoints_apart(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = start(folder).info.fingerprint
    assert start(folder, page_size=8).info.fingerprint == first
    other = tmp_path_factory.mktemp("other")
    write(other, qwen3(), seed=1)
    assert start(other).info.fingerprint != first
    change(folder, rms_norm_eps=1e-5)
    assert start(folder).info.fingerprint != first
    dummies = [start(folder, load_format="dummy", random_seed=seed).info.fingerprint for seed in (0, 0, 1)]
    assert dummies[0] == dummies[1] != dummies[2]


def test_a_slice_reads_the_slice(folder: Path) -> None:
    source = SafetensorsSource(folder, torch.float32)
    name, shape = "model.layers.0.mlp.down_proj.weight", (48, 80)
    whole = source.get(name, shape)
    assert torch.equal(source.get(name, shape, (10, 20)), whole[10:20])
    assert torch.equal(source.get(name, shape, (8, 16), dim=1), whole[:, 8:16])
    assert source.num_parameters == 48 * 80


def test_dummy_weights_are_uniform_and_the_same_in_slices() -> None:
    source = DummySource(3, torch.float32)
    whole = source.get("a", (300, 200))
    assert torch.equal(source.get("a", (300, 200), (100, 200)), whole[100:200])
    assert torch.equal(source.get("a", (300, 200), (50, 100), dim=1), whole[:, 50:100])
    assert torch.equal(DummySource(3, torch.float32).get("a", (300, 200)), whole)
    assert not torch.equal(source.get("b", (300, 200)), whole)
    assert whole.min() >= -1e-3
    assert whole.max() <= 1e-3
    assert whole.std().item() == pytest.approx(1e-3 / 3**0.5, rel=0.01)


def test_dummy_weights_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula, by hand: uniform numbers of a stream named after seed and tensor."""
    values = uniform(hash_text("3/a"), 0, 70 * 33).view(70, 33) * 2e-3 - 1e-3
    source = DummySource(3, torch.float16)
    assert torch.equal(source.get("a", (70, 33)), values.half())
    monkeypatch.setattr(weights, "DUMMY_BLOCK", 100)
    out = torch.zeros(10, 40, dtype=torch.float32)
    source.read(out[:, 5:38], "a", (70, 33), (20, 30))
    assert torch.equal(out[:, 5:38], values[20:30])
    assert torch.equal(source.get("a", (70, 33), (3, 9), dim=1), values[:, 3:9].half())
    assert source.get("a", (70, 33), (70, 70)).shape == (0, 33)
    assert torch.equal(source.get("b", (501,)), (uniform(hash_text("3/b"), 0, 501) * 2e-3 - 1e-3).half())
    assert source.num_parameters == 70 * 33 + 501


def everything(model: Decoder) -> list[torch.Tensor]:
    """All tensors of a decoder without packed weights."""
    assert model.ends is not None
    found = [model.ends.embedding.table, model.ends.norm.weight, model.ends.head.weight, model.cos, model.sin]
    for layer in model.layers:
        norms = layer.attention_norm.weight, layer.mlp_norm.weight, layer.qk_norm
        linears = layer.qkv, layer.o, layer.gate_up, layer.down
        found += [*(linear.weight for linear in linears), *(x for x in norms if x is not None)]
        biases = *(linear.bias for linear in linears), layer.o_bias, layer.down_bias
        found += [bias for bias in biases if bias is not None]
    return found


class Half(Parallel):
    """One rank of two that exchange nothing."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.world = rank, 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parallel", [Parallel(), Half(0), Half(1)])
def test_uploaded_weights_are_those_of_the_files(
    parallel: Parallel, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, on a CPU: threads that read pieces smaller than a matrix, whole rows or some columns of them."""
    write(tmp_path, llama(attention_bias=True, mlp_bias=True), max_shard_size="40KB")
    monkeypatch.setattr(upload, "PIECE_BYTES", 1000)
    shape = load_model_config(tmp_path)
    lines: list[str] = []
    plain = Decoder(shape, SafetensorsSource(tmp_path, dtype), parallel, 64, pack=False)
    uploaded = Decoder(shape, UploadedSource(tmp_path, dtype, "cpu", lines.append), parallel, 64, pack=False)
    expected, found = everything(plain), everything(uploaded)
    assert len(expected) == len(found) == 5 + 2 * 10
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype == dtype
        assert torch.equal(one, other)
    assert re.fullmatch(r"weights: 0\.0 of 0\.0 GiB, 0\.0 GiB/s", lines[-1])


def test_files_that_end_early_are_said(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1000))
    uploader = upload.Uploader("cpu", lambda _: None)
    uploader.put(upload.Matrix(path, 8, 31, 8, torch.float32), slice(None), torch.ones(31, 8))
    uploader.put(upload.Matrix(path, 8, 32, 8, torch.float32), slice(None), torch.ones(32, 8))
    with pytest.raises(ConfigError, match=r"model\.safetensors ends before its last tensor"):
        uploader.finish()
    with pytest.raises(ConfigError, match=r"gone\.safetensors cannot be read: No such file"):
        upload.Uploader("cpu", lambda _: None).put(
            upload.Matrix(tmp_path / "gone.safetensors", 0, 1, 1, torch.float32), slice(None), torch.ones(1, 1)
        )


def test_uploads_take_no_type_they_do_not_know(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(folder, **{name: torch.zeros(80, 48, dtype=torch.int16)})
    source = UploadedSource(folder, torch.float32, "cpu", lambda _: None)
    with pytest.raises(ConfigError, match=rf"{name} is of type I16"):
        Decoder(load_model_config(folder), source, Parallel(), 64, pack=False)


def test_dummy_weights_need_no_files_and_repeat(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    prompt = prompt_of(20)
    first = Driver(start(folder, load_format="dummy"), 16).generate(Sequence(prompt), 8)
    assert Driver(start(folder, load_format="dummy"), 16).generate(Sequence(prompt), 8) == first


def test_what_cannot_be_loaded_is_said(folder: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        start("/nowhere/at/all")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        start(folder.parent)
    change_tensors(folder, extra=torch.zeros(3))
    with pytest.raises(ConfigError, match="no place in this model: extra"):
        start(folder)
    change_tensors(folder, drop="model.norm.weight")
    with pytest.raises(ConfigError, match=r"lacks tensor model\.norm\.weight"):
        start(folder)
    change(folder, hidden_size=56)
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight has shape \[211, 48\].*\[211, 56\]"):
        start(folder)
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ConfigError, match=r"model\.safetensors is no readable"):
        start(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors.*dummy"):
        start(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../a.safetensors"}}))
    with pytest.raises(ConfigError, match="no plain file name"):
        start(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(ConfigError, match=r"names a\.safetensors, which is missing"):
        start(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConfigError, match="no index"):
        start(folder)


def test_old_and_tied_leftovers_are_harmless(tmp_path: Path) -> None:
    write(tmp_path, llama(tie_word_embeddings=True))
    change_tensors(
        tmp_path,
        **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "lm_head.weight": torch.zeros(211, 48)},
    )
    start(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM is not one of.*--model-impl transformers"),
        ({"architectures": []}, "must be a list with one name"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "`factor` is missing"),
        ({"num_hidden_layers": "two"}, "`num_hidden_layers` must be int"),
        ({"num_hidden_layers": None}, "`num_hidden_layers` is missing"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"head_dim": 12}, "multiple of 8"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_a_config_that_we_cannot_follow_is_refused_by_name(folder: Path, changes: dict[str, Any], message: str) -> None:
    change(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        load_model_config(folder)


def test_broken_json_is_said(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json of the model cannot be read"):
        load_model_config(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be a JSON object"):
        load_model_config(folder)


def test_a_config_names_no_code_to_run(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit('remote code ran')\n")
    change(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}, trust_remote_code=True)
    start(folder)


def test_rope_and_end_ids_are_read_from_either_spelling(folder: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    change(folder, rope_parameters={**scaling, "rope_theta": 5e5}, eos_token_id=[7, 9])
    new = load_model_config(folder)
    change(folder, rope_parameters=None, rope_theta=500000, rope_scaling={**scaling, "type": "yarn"})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 11, 99999]}))
    old = load_model_config(folder)
    assert new.rope == old.rope
    assert new.rope.theta == 500000.0
    assert (new.eos_token_ids, old.eos_token_ids) == ((7, 9), (7, 9, 11))


def test_the_context_is_bounded_by_the_positions(folder: Path) -> None:
    assert start(folder).info.context_len == 512
    assert start(folder, context_length=300).info.context_len == 300
    with pytest.raises(ConfigError, match=r"--context-length 513 is more.*\(512\)"):
        start(folder, context_length=513)
    change(folder, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    assert start(folder, context_length=1024).info.context_len == 1024


def test_the_pool_has_the_size_asked_for_or_a_sensible_one(folder: Path) -> None:
    assert start(folder, max_total_tokens=100, page_size=16).num_pages == 6
    # 2 layers × 2 heads × 16 × (k, v) × 4 bytes = 512 bytes a token: 64 contexts of 512 tokens are 16 MiB
    assert start(folder, max_total_tokens=0, page_size=16).num_pages == 64 * 512 // 16
