"""Every family: published files load, compute what the family is said to compute, and are written back as they were."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dirl.config import load_config
from dirl.data.chat import END_TOKENS, MASK_TOKENS, load_tokenizer, mask_token_id, stop_token_ids
from dirl.diffusion.noising import NoiseConfig
from dirl.errors import ConfigError, UserError
from dirl.eval.eval_config import EvalConfig
from dirl.model.checkpoint import ModelConfig, load, load_model, random_model, save_model
from dirl.model.families.a2d import A2DQwen2Config, A2DQwen2LMHeadModel
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.registry import FAMILIES, family_of, read_published
from dirl.model.kernels import use_fused_kernels
from dirl.model.lora import LoraConfig, adapted_layers
from dirl.model.memory import read_shape
from dirl.rl.rl_config import RLConfig
from dirl.rollout.engine import SamplingConfig
from dirl.sft.train import SFTConfig
from dirl.training.full_parameters import full_state_dict
from tests.model import published
from tests.model.family_oracle import block_causal, chosen_experts, logits_of
from tests.model.published import MASK_ID, PUBLISHED, VOCAB, Checkpoint

# Block length (0: full attention) and shift, from what is known of each family.
SCHEMES = {
    "sdar": (4, 0),
    "llada2": (32, 0),
    "fast_dllm_v2": (8, 1),
    "llada": (0, 0),
    "llada_moe": (0, 0),
    "dream": (0, 1),
    "a2d_qwen2": (32, 0),
    "a2d_qwen3": (32, 0),
    "a2d_llama": (0, 1),
    "a2d_qwen3_moe": (8, 0),
}
IDS_L = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(0))  # more than one block of each


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(question: str = "") -> str:
        raise AssertionError(f"asked on the terminal: {question}")

    monkeypatch.setattr("builtins.input", ask)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS_L[None]).logits[0]


def written(checkpoint: Checkpoint, path: Path) -> str:
    published.write(checkpoint, path)
    return str(path)


def config_in(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_are_those_of_the_published_tensors(name: str, tmp_path: Path) -> None:
    checkpoint = PUBLISHED[name]()
    model, tokenizer = load(written(checkpoint, tmp_path))
    scheme = model.scheme
    assert (scheme.block_length, scheme.shift, scheme.mask_token_id) == (*SCHEMES[name], MASK_ID)
    assert (len(tokenizer), model.config.tokenizer_length, mask_token_id(tokenizer)) == (MASK_ID + 1,) * 2 + (MASK_ID,)
    parameters = list(model.parameters())
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == len(parameters)
    may_read_LL = block_causal(len(IDS_L), SCHEMES[name][0] or len(IDS_L))
    with torch.no_grad():
        expected_LV = logits_of(checkpoint, IDS_L, may_read_LL)
    torch.testing.assert_close(logits(model), expected_LV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_saved_it_is_what_was_published(name: str, tmp_path: Path) -> None:
    checkpoint = PUBLISHED[name]()
    model, tokenizer = load(written(checkpoint, tmp_path / "published"))
    save_model(model, tokenizer, tmp_path / "saved", full_state_dict(model, keep=True))
    tensors, config = load_file(tmp_path / "saved/model.safetensors"), config_in(tmp_path / "saved")
    assert tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in checkpoint.tensors.items())
    expected = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    if name != "sdar":  # which transformers writes, with what is new beside what was there
        assert config == expected
    again, read = load(str(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(model))
    assert (read.get_vocab(), mask_token_id(read)) == (tokenizer.get_vocab(), MASK_ID)
    assert "auto_map" not in (tmp_path / "saved/tokenizer_config.json").read_text()


@pytest.mark.parametrize("name", ["a2d_qwen3_moe", "llada2"])
def test_experts_are_computed_alike_whatever_was_made_before(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers hands a class the answer that it once found for its parent."""
    path = written(PUBLISHED[name](), tmp_path)
    model_class = family_of(config_in(tmp_path), "").model_class
    if (remembered := "_can_set_experts_implementation_cached_value") in vars(model_class):
        monkeypatch.delattr(model_class, remembered)
    (parent,) = (base for base in model_class.__bases__ if base is not BlockDiffusionModel)
    assert parent._can_set_experts_implementation()  # and remembers it, for all classes made of it
    assert load(path)[0].config._experts_implementation == "eager"


def test_every_family_is_among_them() -> None:
    shown = {PUBLISHED[name]().config["architectures"][0] for name in PUBLISHED}
    assert {family.architecture for family in FAMILIES} == shown | {"SDARMoeForCausalLM"}  # in test_checkpoint.py


def test_tokens_of_families_are_known_where_tokenizers_are_read() -> None:
    assert {family.mask_token for family in FAMILIES} == set(MASK_TOKENS)
    assert {token for family in FAMILIES for token in family.stop_tokens} == set(END_TOKENS)


# What a loader could drop or turn round without an error, and what must then be seen in the logits.
TRAPS: dict[str, tuple[str, Callable[[Checkpoint], Checkpoint]]] = {
    "rms eps": ("llada", lambda c: with_config(c, rms_norm_eps=1e-6)),
    "rotary base": ("dream", lambda c: with_config(c, rope_theta=10_000.0)),
    "part of the rotary": ("llada2", lambda c: with_config(c, partial_rotary_factor=1.0)),
    "biases": ("fast_dllm_v2", lambda c: changed(c, "k_proj.bias", lambda t: t.zero_())),
    "norms of queries": ("llada_moe", lambda c: changed(c, "q_norm", lambda t: t.fill_(1))),
    "scale of experts": ("llada2", lambda c: with_config(c, routed_scaling_factor=1.0)),
    "bias of choice": ("llada2", lambda c: changed(c, "expert_bias", lambda t: t.zero_())),
    "groups": ("llada2", lambda c: with_config(c, topk_group=4)),
    "gate and up": ("llada", lambda c: swapped(c, "ff_proj", "up_proj")),
    "experts' gate and up": ("llada2", lambda c: swapped(c, "gate_proj", "up_proj")),
}


def with_config(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    return replace(checkpoint, config={**checkpoint.config, **changes})


def changed(checkpoint: Checkpoint, part: str, change: Callable[[Tensor], Tensor]) -> Checkpoint:
    tensors = {name: change(t.clone()) if part in name else t for name, t in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def swapped(checkpoint: Checkpoint, one: str, other: str) -> Checkpoint:
    def partner(name: str) -> str:
        return name.replace(one, other) if one in name else name.replace(other, one)

    return replace(checkpoint, tensors={name: checkpoint.tensors[partner(name)] for name in checkpoint.tensors})


@pytest.mark.parametrize("trap", TRAPS)
def test_what_can_be_lost_unseen_changes_the_logits(trap: str, tmp_path: Path) -> None:
    name, change = TRAPS[trap]
    checkpoint = PUBLISHED[name]()
    right, wrong = (written(c, tmp_path / f"{i}") for i, c in enumerate((checkpoint, change(checkpoint))))
    assert float((logits(load(right)[0]) - logits(load(wrong)[0])).abs().max()) > 1e-3


def test_biases_of_experts_count_in_the_choice_alone(tmp_path: Path) -> None:
    checkpoint = published.llada2()
    model, _ = load(written(checkpoint, tmp_path / "a"))
    raised, _ = load(written(changed(checkpoint, "expert_bias", lambda t: t + 3), tmp_path / "b"))
    torch.testing.assert_close(logits(raised), logits(model), atol=1e-6, rtol=0)
    # Groups that are dropped get no 0, which is above a biased score below 0 and would be chosen.
    mlp, asked = model.model.layers[1].mlp, []
    mlp.experts.register_forward_pre_hook(lambda _, given: asked.extend(sorted(row) for row in given[1].tolist()))
    hidden_LD = torch.randn(200, 32)
    mlp(hidden_LD[None])
    scores_LX = (hidden_LD @ mlp.gate.weight.T).sigmoid()
    bias_X = checkpoint.tensors["model.layers.1.mlp.gate.expert_bias"]
    chosen = [chosen_experts(scores_X, bias_X, checkpoint.config) for scores_X in scores_LX]
    assert asked == [sorted(row) for row in chosen]
    below_zero = [
        any(scores_X[e] + bias_X[e] < 0 for e in row) for scores_X, row in zip(scores_LX, chosen, strict=True)
    ]
    assert sum(below_zero) > 20


def test_experts_of_llada_moe_are_not_renormalised(tmp_path: Path) -> None:
    for layers in ([1, 1, 1], 1):
        model, _ = load(written(with_config(published.llada_moe(), moe_layer_freq=layers), tmp_path))
        assert (model.config.norm_topk_prob, model.config.mlp_only_layers) == (False, [])
    config = with_config(published.llada_moe(), moe_layer_freq=[0, 1, 1])
    assert (
        random_model(ModelConfig(path=written(config, tmp_path)), load_tokenizer(tmp_path)).model.layers[0].mlp.up_proj
    )


def test_norms_of_queries_are_there_where_a_preview_does_not_say_so(tmp_path: Path) -> None:
    model, _ = load(written(published.llada2(), tmp_path))
    assert "use_qk_norm" not in published.llada2().config
    assert model.model.layers[0].self_attn.q_norm.weight.std() > 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, ("autoregressive Qwen3ForCausalLM", "dirl convert {path} OUT")),
        ({"architectures": ["GPTForCausalLM"]}, ("is a GPTForCausalLM", "LLaDA2MoeModelLM, Fast_dLLM")),
        ({"architectures": []}, ("no architectures", "known are SDARForCausalLM")),
        ({"architectures": ["DiffusionGemmaForBlockDiffusion"]}, ("not supported", "random tokens")),
        ({"model_type": "llada2_moe_veomni"}, ("not supported", "stacked", "moe_convertor.py")),
        ({"score_function": "softmax"}, ("score_function='softmax'", "of LLaDA2 only 'sigmoid' is supported")),
        ({"block_size": "four"}, ("block_size='four', which is impossible",)),
        ({"hidden_size": "wide"}, ("no LLaDA2's", "hidden_size", "'wide'")),
        ({"shift": 2}, ("shift=2, which is impossible",)),
    ],
)
def test_what_is_no_family_is_named_in_one_line(
    changes: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    path = written(with_config(published.llada2(), **changes), tmp_path)
    for read in (lambda: load(path), lambda: read_shape(ModelConfig(path=path))):
        with pytest.raises(UserError) as error:
            read()
        message = str(error.value)
        assert "\n" not in message and "model.path" in message
        assert all(word.format(path=path) in message for word in words), message


def test_mask_tokens_of_config_and_tokenizer_may_not_differ(tmp_path: Path) -> None:
    path = written(with_config(published.llada(), mask_token_id=5), tmp_path)
    with pytest.raises(UserError, match="mask_token_id 5, the tokenizer's mask token is 85; use the tokenizer"):
        load(path)
    silent = replace(published.llada(), mask_token="<|hole|>")  # a text nobody knows: the config names the id
    assert load(written(silent, tmp_path))[0].scheme.mask_token_id == MASK_ID
    assert load(written(with_config(published.sdar(), mask_token_id=5), tmp_path))[0].scheme.mask_token_id == MASK_ID


@pytest.mark.parametrize(
    ("name", "key"), [("fast_dllm_v2", "bd_size"), ("llada2", "block_size"), ("dream", "block_size")]
)
def test_what_has_changed_is_saved_under_its_published_key(name: str, key: str, tmp_path: Path) -> None:
    path = written(PUBLISHED[name](), tmp_path / "published")
    tokenizer = load_tokenizer(path)
    model = load_model(ModelConfig(path=path, block_length=16, dtype="bfloat16"), tokenizer)
    save_model(model, tokenizer, tmp_path / "saved")
    before, after = config_in(tmp_path / "published"), config_in(tmp_path / "saved")
    before.pop("auto_map", None)
    assert after == {**before, key: 16, "torch_dtype": "bfloat16"}
    assert load(str(tmp_path / "saved"))[0].config.block_size == 16
    assert logits(model).isfinite().all()


def test_a_converted_model_says_how_it_reads_masks(tmp_path: Path) -> None:
    """Made by its class instead of read, as conversion does."""
    tokenizer = load_tokenizer(written(published.a2d_qwen2(), tmp_path / "tokenizer"))
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mask_token_id": MASK_ID}
    model = A2DQwen2LMHeadModel(A2DQwen2Config(**sizes, **heads, block_size=8, shift=1, full_attention=True))
    save_model(model, tokenizer, tmp_path / "saved")
    config = config_in(tmp_path / "saved")
    assert (config["architectures"], config["model_type"]) == (["A2DQwen2LMHeadModel"], "a2d-qwen2")
    again, _ = load(str(tmp_path / "saved"))
    assert again.scheme == model.scheme and again.config.block_size == 8
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_json_alone_tells_the_size_and_makes_a_model_like_it(name: str, tmp_path: Path) -> None:
    path = written(PUBLISHED[name](), tmp_path)
    model, tokenizer = load(path)
    (tmp_path / "model.safetensors").unlink()
    config = ModelConfig(path=path)
    alike = random_model(config, tokenizer)
    assert {n: p.shape for n, p in alike.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert (
        alike.tags == model.tags == ("masked-diffusion" if model.scheme.is_full else "block-diffusion", alike.tags[1])
    )
    assert alike.scheme == model.scheme and alike.config.tokenizer_length == MASK_ID + 1
    model.config.save_pretrained(tmp_path / "config alone")  # as a server of rollouts gets it
    again = random_model(ModelConfig(path=str(tmp_path / "config alone")), tokenizer)
    assert {**again.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
    layers = adapted_layers(model, LoraConfig(r=2))
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {layer.rpartition(".")[2] for layer in layers}
    assert not any("gate" in layer and "gate_proj" not in layer for layer in layers)  # routers are left alone


def test_the_token_that_fills_rows_up_is_trained(tmp_path: Path) -> None:
    model, _ = load(written(published.llada(), tmp_path))
    fill = model.config.pad_token_id
    assert fill == model.config.eos_token_id
    model(torch.tensor([[1, fill, 2]])).logits.sum().backward()
    assert float(model.model.embed_tokens.weight.grad[fill].abs().max()) > 0


@pytest.mark.parametrize("name", ["sdar", "dream", "llada"])
def test_code_beside_the_weights_never_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on the terminal, and run it for a `y`; of Dream the tokenizer is code too."""
    checkpoint, ran = PUBLISHED[name](), tmp_path / "ran"
    directory = written(checkpoint, tmp_path / "model")
    named = json.dumps([checkpoint.config.get("auto_map"), checkpoint.tokenizer.get("auto_map")])
    files = set(re.findall(r"\b(\w+)\.[A-Z]\w+", named))
    assert len(files) == (3 if name == "dream" else 2)
    for file in files:
        Path(directory, f"{file}.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    load(directory)
    assert not ran.exists()


def test_stop_tokens_are_those_of_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(written(published.llada2(), tmp_path))
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))
    assert stops == ["<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|role_end|>"]


def test_liger_without_kernels_for_a_family_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load(written(published.llada2(), tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    use_fused_kernels(model, "auto")
    with pytest.raises(UserError, match="no kernels for LLaDA2MoeModelLM; use auto or torch"):
        use_fused_kernels(model, "liger")


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_values_of_the_family(name: str, tmp_path: Path) -> None:
    published.write(PUBLISHED[name](), tmp_path)
    family = family_of(read_published(str(tmp_path)), "")
    here = f"model.path={tmp_path}"
    evaluated = load_config(EvalConfig, None, [here, "modes=[custom]", "sampling=published", "sampling.top_k=7"])
    assert evaluated.sampling == SamplingConfig(**{**family.decoder, "top_k": 7})
    trained = load_config(SFTConfig, None, [here, "noise=published", "noise.low_discrepancy=false"])
    assert trained.noise == NoiseConfig(**{**family.sft, "low_discrepancy": False})
    practised = load_config(RLConfig, None, [here, "rollout=published", "rollout.num_generations=3"])
    assert practised.rollout.sub_block_length == family.decoder.get("sub_block_length", 0)
    assert (practised.rollout.temperature, practised.rollout.top_p) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["noise=published"], "noise=published: .* model.path names no model; set it"),
        (["model.path=x", "noise=llada"], "noise=llada: no such preset; there is published"),
    ],
)
def test_presets_that_cannot_be(overrides: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(SFTConfig, None, overrides)
