"""Directories in SDAR's own format, written by plain Qwen3 code: what loads, what is written back, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dirl.data.chat import load_tokenizer, save_tokenizer
from dirl.data.rows import DataError
from dirl.errors import UserError
from dirl.files import expand
from dirl.model import checkpoint
from dirl.model.checkpoint import ModelConfig, load, load_model, save_model, write_final
from dirl.model.families.sdar import SDARForCausalLM, SDARMoeForCausalLM
from dirl.model.lora import LoraConfig
from dirl.model.memory import read_shape
from dirl.model.tiny import save_tiny_model, tiny

ROPE_THETA = 5_000.0  # neither transformers' default nor the tiny model's: a loader that drops it is seen
SIZES: dict[str, Any] = {
    "vocab_size": 280,  # more rows than the tokenizer has tokens, as in SDAR
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TOKENIZER = tiny()[1]


def write_sdar_directory(path: Path, *, experts: bool = False) -> Any:
    """A directory as SDAR publishes it, made without our code; returns the Qwen3 model whose weights it holds."""
    theirs: Any
    if experts:
        theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)).eval()
    else:
        theirs = Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    theirs.save_pretrained(path)
    save_tokenizer(TOKENIZER, path)
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    name = "SDARMoe" if experts else "SDAR"
    config |= {
        "model_type": "sdar_moe" if experts else "sdar",
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_sdar.{name}Config",
            "AutoModelForCausalLM": f"modeling_sdar.{name}ForCausalLM",
        },
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "block_size": 4,
        "mask_token_id": 5,  # the tokenizer knows better
    }
    (path / "config.json").write_text(json.dumps(config))
    return theirs


def block_masked_logits(theirs: Any, ids: Tensor, block_length: int = 4) -> Tensor:
    """Qwen3's own code with an explicit 4D block mask."""
    block_L = torch.arange(ids.shape[1]) // block_length
    allowed = (block_L[None, :] <= block_L[:, None])[None, None]
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return theirs(ids, attention_mask=mask.expand(len(ids), -1, -1, -1)).logits


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("experts", [False, True], ids=["sdar", "sdar_moe"])
def test_an_sdar_directory_has_the_logits_of_qwen3(tmp_path: Path, experts: bool) -> None:
    theirs = write_sdar_directory(tmp_path, experts=experts)
    model, tokenizer = load(str(tmp_path))
    assert type(model) is (SDARMoeForCausalLM if experts else SDARForCausalLM)
    assert (model.config.block_size, model.config.tokenizer_length) == (4, len(tokenizer))
    assert model.config.mask_token_id == tokenizer.mask_token_id
    ids = torch.randint(0, 280, (2, 22))
    torch.testing.assert_close(logits(model, ids), block_masked_logits(theirs, ids), atol=2e-5, rtol=1e-5)
    # The rotary base was read: with transformers' default the logits are others.
    theirs.model.rotary_emb.inv_freq = 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
    assert float((logits(model, ids) - block_masked_logits(theirs, ids)).abs().max()) > 1e-2


@pytest.mark.parametrize("experts", [False, True], ids=["sdar", "sdar_moe"])
def test_saved_and_loaded_again_it_is_the_same(tmp_path: Path, experts: bool) -> None:
    write_sdar_directory(tmp_path / "original", experts=experts)
    model, tokenizer = load(str(tmp_path / "original"))
    save_model(model, tokenizer, tmp_path / "saved")
    again, _ = load(str(tmp_path / "saved"))
    ids = torch.randint(0, 280, (2, 22))
    assert torch.equal(logits(again, ids), logits(model, ids))
    names = {path: names_in(tmp_path / path) for path in ("original", "saved")}
    assert names["saved"] == names["original"]
    layer = "model.layers.0.mlp.experts.0.gate_proj.weight" if experts else "model.layers.0.mlp.gate_proj.weight"
    assert layer in names["saved"]


def test_a_scaled_rotary_embedding_is_written_for_older_code(tmp_path: Path) -> None:
    write_sdar_directory(tmp_path / "original")
    file = tmp_path / "original" / "config.json"
    scale = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_scaling": scale}))
    model, tokenizer = load(str(tmp_path / "original"))
    save_model(model, tokenizer, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["rope_scaling"].items() >= scale.items() and saved["rope_theta"] == ROPE_THETA
    ids = torch.randint(0, 280, (1, 9))
    assert torch.equal(logits(load(str(tmp_path / "saved"))[0], ids), logits(model, ids))


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    write_sdar_directory(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_sliding_window": True, "sliding_window": 8}))
    with pytest.raises(UserError, match=r"config\.json says use_sliding_window=True; of SDAR only False is supported"):
        load(str(tmp_path))


def names_in(path: Path) -> set[str]:
    names: set[str] = set()
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


def test_config_is_written_for_older_code(tmp_path: Path) -> None:
    write_sdar_directory(tmp_path / "original")
    model, tokenizer = load(str(tmp_path / "original"))
    save_model(model, tokenizer, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["rope_theta"] == ROPE_THETA
    assert (config["model_type"], config["architectures"]) == ("sdar", ["SDARForCausalLM"])
    assert (config["block_size"], config["mask_token_id"]) == (4, tokenizer.mask_token_id)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    ids = torch.randint(0, 280, (1, 9))
    assert torch.equal(logits(plain, ids), logits(model, ids))


def test_options_of_the_model(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    config = ModelConfig(path=str(tmp_path), dtype="bfloat16", block_length=8, gradient_checkpointing=True)
    model = load_model(config, TOKENIZER)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.block_size == 8
    assert model.is_gradient_checkpointing
    assert load_model(ModelConfig(path=str(tmp_path)), TOKENIZER).config.block_size == 4


def assert_one_line(error: pytest.ExceptionInfo[Exception], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_full_disk_at_the_end_is_a_line_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # what tokenizers raises

    monkeypatch.setattr(checkpoint, "save_tokenizer", full)
    with pytest.raises(UserError, match=r"final cannot be written: .*No space left.*; make room") as error:
        write_final(*tiny(), tmp_path, base="", lora=LoraConfig(), is_main=True)
    assert_one_line(error)
    assert not list(tmp_path.iterdir())


def test_a_directory_without_a_config_is_named(tmp_path: Path) -> None:
    for path in (str(tmp_path), str(tmp_path / "nowhere"), "./a", "nowhere"):
        with pytest.raises(FileNotFoundError) as error:
            load_model(ModelConfig(path=path), TOKENIZER)
        assert_one_line(error, "model.path", path, "Hugging Face directory")


@pytest.mark.parametrize(
    ("name", "damage", "word"),
    [
        ("config.json", lambda content: b"{}", "architectures"),
        ("config.json", lambda content: content.replace(b'"hidden_size": 128', b'"hidden_size": 64'), "RuntimeError"),
        (
            "config.json",
            lambda content: content.replace(b'"hidden_size": 128', b'"hidden_size": "big"'),
            "expected int",
        ),
        ("config.json", lambda content: content.replace(b'"num_attention_heads": 4', b'"num_attention_heads": 0'), ""),
        ("config.json", lambda content: b"[]", "no JSON object"),
        ("model.safetensors", lambda content: content[:1000], "SafetensorError"),
        ("model.safetensors", None, "model.safetensors"),
    ],
)
def test_damaged_files_are_named(name: str, damage: Callable[[bytes], bytes] | None, word: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(damage(content))
        assert file.read_bytes() != content
    with pytest.raises(UserError) as error:
        load_model(ModelConfig(path=str(tmp_path)), TOKENIZER)
    assert_one_line(error, "model.path", word)
    with pytest.raises(UserError) as error:
        load(str(tmp_path))
    assert_one_line(error)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"garbage", b"[1, 2]", b'{"metadata": {}, "weight_map": {}}'])
def test_other_forms_of_weights_that_are_damaged_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_model(ModelConfig(path=str(tmp_path)), TOKENIZER)
    assert_one_line(error, "model.path", str(tmp_path))


class Touches:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_weights_are_read_and_code_among_them_never_runs(tmp_path: Path) -> None:
    directory, touched = tmp_path / "model", tmp_path / "touched"
    save_tiny_model(directory)
    config, expected = ModelConfig(path=str(directory)), load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(expected, directory / "pytorch_model.bin")
    loaded = load_model(config, TOKENIZER).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    torch.save({**expected, "more": Touches(touched)}, directory / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        load_model(config, TOKENIZER)
    assert_one_line(error, "model.path", str(directory), "Weights only load failed")
    assert not touched.exists()


def test_an_index_names_files_beside_it(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    weights = (tmp_path / "model/model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(weights), "../outside.safetensors")}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as error:
        load_model(ModelConfig(path=str(tmp_path / "model")), TOKENIZER)
    assert_one_line(error, "index.json", "'../outside.safetensors'", "beside its index")


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load_model(ModelConfig(path=str(tmp_path)), TOKENIZER)
    assert_one_line(error, "lack ['model.layers.2.mlp.up_proj.weight']")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(number: float, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    weights = {name: weight.to(dtype) for name, weight in load_file(tmp_path / "model.safetensors").items()}
    weights["model.norm.weight"][3] = number
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.path: model\.norm\.weight in .* holds NaN or infinities"):
        load(str(tmp_path))


def test_another_kind_of_model_is_named(tmp_path: Path) -> None:
    Qwen3ForCausalLM(Qwen3Config(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        load_model(ModelConfig(path=str(tmp_path)), TOKENIZER)
    assert_one_line(error, "model.path", "Qwen3ForCausalLM", "SDARForCausalLM", f"dirl convert {tmp_path} OUT")


def test_a_tokenizer_that_does_not_fit_is_named(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    _, tokenizer = tiny()
    tokenizer.add_tokens(["<|one_more|>"])
    with pytest.raises(ValueError) as error:
        load_model(ModelConfig(path=str(tmp_path)), tokenizer)
    assert_one_line(error, "265", "264", "tokenizer")


def test_a_negative_block_length_is_named() -> None:
    with pytest.raises(ValueError, match="block_length must be at least 0"):
        ModelConfig(block_length=-4)


@pytest.mark.parametrize("written", ["~/it", "./it", "it", "{here}/it", "owner/it"])
def test_tokenizer_and_model_are_found_at_one_place(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = written.format(here=tmp_path)
    write_sdar_directory(expand(path))
    model, tokenizer = load(path)
    assert len(tokenizer) == model.config.tokenizer_length
    assert read_shape(ModelConfig(path=path)).hidden_size == model.config.hidden_size


@pytest.mark.parametrize(
    ("path", "is_on_hub"),
    [
        *((path, False) for path in ("~/it", "./it", "it", "/no/it", "/it", "a/b/it", "~/owner/it", "owner/it.json")),
        ("owner/it", True),
    ],
)
def test_tokenizer_and_model_agree_on_what_is_a_hub_id(
    path: str, is_on_hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ModelConfig(path=path)
    with pytest.raises(DataError, match="cannot load a tokenizer" if is_on_hub else "no tokenizer at"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="cannot load 'owner" if is_on_hub else "no config.json in"):
        load_model(config, TOKENIZER)
    with pytest.raises(UserError, match="no readable config.json" if is_on_hub else "no such directory"):
        read_shape(config)
