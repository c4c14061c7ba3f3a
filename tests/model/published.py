"""Tiny random checkpoints in the form each family publishes: names of tensors, keys of config.json, tokenizer files.

Nothing of `dirl.model` is used: what is written here is what the published files hold, with smaller numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

VOCAB, HIDDEN, HEADS, KV_HEADS, LAYERS, MLP = 100, 32, 4, 2, 3, 48
EXPERTS, EXPERT_MLP = 8, 16
WORDS = [f"word{number}" for number in range(80)]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())[:80]  # for tokenizers of vocab.json and merges.txt
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|role_end|>")
MASK_ID = len(WORDS) + len(SPECIALS)  # the last token; ids from there to VOCAB have none

Config, Tensors = dict[str, Any], dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """One family's files."""

    config: Config
    tensors: Tensors
    tokenizer: Mapping[str, Any]  # settings of tokenizer_config.json
    mask_token: str
    generation: Mapping[str, Any] | None = None  # generation_config.json


def write(checkpoint: Checkpoint, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(checkpoint.config))
    save_file(checkpoint.tensors, path / "model.safetensors", metadata={"format": "pt"})
    if checkpoint.generation is not None:
        (path / "generation_config.json").write_text(json.dumps(checkpoint.generation))
    write_tokenizer(checkpoint, path)


def write_tokenizer(checkpoint: Checkpoint, path: Path) -> None:
    has_code = "auto_map" in checkpoint.tokenizer  # and then no tokenizer.json, as Dream's
    texts = BYTES if has_code else WORDS
    added = [*SPECIALS, checkpoint.mask_token]
    decoder = {
        str(len(texts) + place): {"content": text, "special": True, "lstrip": False, "rstrip": False}
        | {"normalized": False, "single_word": False}
        for place, text in enumerate(added)
    }
    settings = {"added_tokens_decoder": decoder, "eos_token": SPECIALS[0], **checkpoint.tokenizer}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if has_code:
        (path / "vocab.json").write_text(json.dumps({text: place for place, text in enumerate(texts)}))
        (path / "merges.txt").write_text("#version: 0.2\n")
        return
    backend = Tokenizer(models.WordLevel({text: place for place, text in enumerate(texts)}, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(added)
    backend.save(str(path / "tokenizer.json"))


def _linear(rows: int, columns: int) -> Tensor:
    return 0.3 * torch.randn(rows, columns)


def _head() -> Tensor:
    """Logits of about 1, so that an error of 1e-5 is one of the computation."""
    return 0.1 * torch.randn(VOCAB, HIDDEN)


def _norm(size: int) -> Tensor:
    return 1 + 0.3 * torch.randn(size)


def _mlp(prefix: str, width: int) -> Tensors:
    return {
        f"{prefix}.gate_proj.weight": _linear(width, HIDDEN),
        f"{prefix}.up_proj.weight": _linear(width, HIDDEN),
        f"{prefix}.down_proj.weight": _linear(HIDDEN, width),
    }


def _expert_mlp(prefix: str) -> Tensors:
    tensors = {f"{prefix}.gate.weight": _linear(EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        tensors |= _mlp(f"{prefix}.experts.{expert}", EXPERT_MLP)
    return tensors


def qwen_tensors(*, head_dim: int, biased: bool, normed: bool, experts: bool = False, tied: bool = False) -> Tensors:
    """Names of Qwen2, Qwen3, Qwen3-MoE and Llama."""
    tensors = {"model.embed_tokens.weight": _head(), "model.norm.weight": _norm(HIDDEN)}
    if not tied:
        tensors["lm_head.weight"] = _head()
    for layer in range(LAYERS):
        here = f"model.layers.{layer}"
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{here}.self_attn.{name}_proj.weight"] = _linear(heads * head_dim, HIDDEN)
            if biased:
                tensors[f"{here}.self_attn.{name}_proj.bias"] = torch.randn(heads * head_dim)
            if normed and name != "v":
                tensors[f"{here}.self_attn.{name}_norm.weight"] = _norm(head_dim)
        tensors[f"{here}.self_attn.o_proj.weight"] = _linear(HIDDEN, HEADS * head_dim)
        tensors[f"{here}.input_layernorm.weight"] = _norm(HIDDEN)
        tensors[f"{here}.post_attention_layernorm.weight"] = _norm(HIDDEN)
        tensors |= _expert_mlp(f"{here}.mlp") if experts else _mlp(f"{here}.mlp", MLP)
    return tensors


def _code(stem: str, config: str, **models: str) -> Config:
    """An `auto_map` that names code files."""
    return {
        "AutoConfig": f"configuration_{stem}.{config}",
        **{auto: f"modeling_{stem}.{name}" for auto, name in models.items()},
    }


def _qwen_config(architecture: str, model_type: str, **more: Any) -> Config:
    return {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "bos_token_id": 80,
        "eos_token_id": 80,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": MLP,
        "max_position_embeddings": 512,
        "max_window_layers": LAYERS,
        "model_type": model_type,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-2,  # large, as are the other numbers that a loader may drop unseen
        "rope_scaling": None,
        "rope_theta": 500.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
        **more,
    }


def sdar() -> Checkpoint:
    """TraDo's too."""
    more = {"head_dim": 16, "block_size": 4, "mask_token_id": MASK_ID, "fuse_cross_entropy": True, "debug": False}
    code = _code("sdar", "SDARConfig", AutoModelForCausalLM="SDARForCausalLM")
    return Checkpoint(
        _qwen_config("SDARForCausalLM", "sdar", auto_map=code, attention_bias=False, **more),
        qwen_tensors(head_dim=16, biased=False, normed=True),
        {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<|MASK|>"},
        "<|MASK|>",
    )


def a2d_qwen2() -> Checkpoint:
    """dllm's bd3lm of Qwen2.5."""
    return Checkpoint(
        _qwen_config("A2DQwen2LMHeadModel", "a2d-qwen2"),
        qwen_tensors(head_dim=8, biased=True, normed=False),
        {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<|mask|>"},
        "<|mask|>",
    )


def a2d_qwen3() -> Checkpoint:
    """dllm's bd3lm of Qwen3-0.6B, which has no lm_head."""
    return Checkpoint(
        _qwen_config("A2DQwen3LMHeadModel", "a2d-qwen3", head_dim=16, attention_bias=False, tie_word_embeddings=True),
        qwen_tensors(head_dim=16, biased=False, normed=True, tied=True),
        {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<|mask|>"},
        "<|mask|>",
    )


def a2d_llama() -> Checkpoint:
    """A converted model that says in its config.json how it reads masks."""
    more = {"block_size": 8, "shift": 1, "full_attention": True, "mask_token_id": MASK_ID}
    return Checkpoint(
        _qwen_config("A2DLlamaLMHeadModel", "a2d-llama", head_dim=8, attention_bias=False, mlp_bias=False, **more),
        qwen_tensors(head_dim=8, biased=False, normed=False),
        {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<|mask|>"},
        "<|mask|>",
    )


def a2d_qwen3_moe() -> Checkpoint:
    """A converted mixture of experts."""
    more = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_MLP, "head_dim": 16}
    more |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "block_size": 8}
    return Checkpoint(
        _qwen_config("A2DQwen3MoeLMHeadModel", "a2d-qwen3_moe", attention_bias=False, **more),
        qwen_tensors(head_dim=16, biased=False, normed=True, experts=True),
        {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<|mask|>"},
        "<|mask|>",
    )


def dream() -> Checkpoint:
    """A tokenizer of its own, as code; an auto_map without AutoModelForCausalLM, yet with lm_head."""
    return Checkpoint(
        _qwen_config(
            "DreamModel",
            "Dream",
            auto_map=_code("dream", "DreamConfig", AutoModel="DreamModel"),
            mask_token_id=MASK_ID,
            pad_token_id=80,
        ),
        qwen_tensors(head_dim=8, biased=True, normed=False),
        {
            "tokenizer_class": "DreamTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "mask_token": "<|mask|>",
            "pad_token": "<|endoftext|>",
            "chat_template": "{{ messages }}",
        },
        "<|mask|>",
        {"_from_model_config": True, "alg": "origin", "alg_temp": None, "eps": 0.001, "mask_token_id": None}
        | {"steps": 512, "output_history": False, "bos_token_id": 80, "eos_token_id": 80, "pad_token_id": 80},
    )


def fast_dllm_v2() -> Checkpoint:
    """The mask is an added token that nothing names."""
    stem = {"AutoConfig": "configuration.Fast_dLLM_QwenConfig"}
    code = {**stem, "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM"}
    more = {"bd_size": 8, "conplemenrary_mask": True}  # so spelled
    return Checkpoint(
        _qwen_config("Fast_dLLM_QwenForCausalLM", "Fast_dLLM_Qwen", auto_map=code, eos_token_id=82, **more),
        qwen_tensors(head_dim=8, biased=True, normed=False),
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        "|<MASK>|",
        {"bos_token_id": 80, "eos_token_id": [82, 80], "pad_token_id": 80, "do_sample": True, "temperature": 0.7}
        | {"top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "transformers_version": "4.53.1"},
    )


def llada() -> Checkpoint:
    """OLMo's names."""
    tensors = {
        "model.transformer.wte.weight": torch.randn(VOCAB, HIDDEN),
        "model.transformer.ln_f.weight": _norm(HIDDEN),
        "model.transformer.ff_out.weight": _head(),
    }
    for layer in range(LAYERS):
        here = f"model.transformer.blocks.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            tensors[f"{here}.{name}.weight"] = _linear(HIDDEN, HIDDEN)
        for name in ("ff_proj", "up_proj"):
            tensors[f"{here}.{name}.weight"] = _linear(MLP, HIDDEN)
        tensors[f"{here}.ff_out.weight"] = _linear(HIDDEN, MLP)
        tensors[f"{here}.attn_norm.weight"] = _norm(HIDDEN)
        tensors[f"{here}.ff_norm.weight"] = _norm(HIDDEN)
    config = {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "auto_map": _code("llada", "LLaDAConfig", AutoModel="LLaDAModelLM", AutoModelForCausalLM="LLaDAModelLM"),
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": HIDDEN,
        "embedding_dropout": 0.0,
        "embedding_size": VOCAB,
        "eos_token_id": 80,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK_ID,
        "max_sequence_length": 512,
        "mlp_hidden_size": MLP,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "n_layers": LAYERS,
        "pad_token_id": 80,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-2,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500.0,
        "scale_logits": False,
        "torch_dtype": "float32",
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": VOCAB,
        "weight_tying": False,
    }
    return Checkpoint(config, tensors, {"tokenizer_class": "PreTrainedTokenizerFast"}, "<|mdm_mask|>")


def llada_moe() -> Checkpoint:
    """model_type "llada", with Qwen3-MoE's tensors."""
    config = {
        "architectures": ["LLaDAMoEModelLM"],
        "auto_map": _code("lladamoe", "LLaDAConfig", AutoModelForCausalLM="LLaDAMoEModelLM"),
        "dense_intermediate_size": MLP,
        "eos_token_id": 80,
        "expert_intermediate_size": EXPERT_MLP,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "max_position_embeddings": 512,
        "model_type": "llada",
        "moe_layer_freq": [1] * LAYERS,
        "moe_router_score_function": "softmax",
        "num_attention_heads": HEADS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "pad_token_id": 80,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rms_norm_eps": 1e-2,
        "rope_scaling": None,
        "rope_theta": 500.0,
        "shared_expert_intermediate_size": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": VOCAB,
    }
    tensors = qwen_tensors(head_dim=8, biased=False, normed=True, experts=True)
    for layer in range(LAYERS):
        for name in ("k", "v"):
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = _linear(HIDDEN, HIDDEN)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<|mask|>"}
    return Checkpoint(config, tensors, settings, "<|mask|>")


def llada2() -> Checkpoint:
    """Fused queries, keys and values; a dense first layer; experts in groups, with biases of their choice."""
    head_dim = 16
    tensors = {
        "model.word_embeddings.weight": torch.randn(VOCAB, HIDDEN),
        "model.norm.weight": _norm(HIDDEN),
        "lm_head.weight": _head(),
    }
    for layer in range(LAYERS):
        here = f"model.layers.{layer}"
        tensors |= {
            f"{here}.input_layernorm.weight": _norm(HIDDEN),
            f"{here}.post_attention_layernorm.weight": _norm(HIDDEN),
            f"{here}.attention.query_key_value.weight": _linear((HEADS + 2 * KV_HEADS) * head_dim, HIDDEN),
            f"{here}.attention.query_layernorm.weight": _norm(head_dim),
            f"{here}.attention.key_layernorm.weight": _norm(head_dim),
            f"{here}.attention.dense.weight": _linear(HIDDEN, HEADS * head_dim),
        }
        if layer == 0:
            tensors |= _mlp(f"{here}.mlp", MLP)
            continue
        tensors |= _expert_mlp(f"{here}.mlp") | _mlp(f"{here}.mlp.shared_experts", EXPERT_MLP)
        tensors[f"{here}.mlp.gate.expert_bias"] = 0.5 * torch.randn(EXPERTS) - 1  # most biased scores are below 0
    config = {
        "architectures": ["LLaDA2MoeModelLM"],
        "attention_dropout": 0.0,
        "auto_map": _code("llada2_moe", "LLaDA2MoeConfig", AutoModelForCausalLM="LLaDA2MoeModelLM"),
        "first_k_dense_replace": 1,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "max_position_embeddings": 512,
        "max_window_layers": 28,
        "model_type": "llada2_moe",
        "moe_intermediate_size": EXPERT_MLP,
        "moe_router_enable_expert_bias": True,
        "n_group": 4,
        "norm_topk_prob": True,
        "num_attention_heads": HEADS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "num_shared_experts": 1,
        "pad_token_id": 80,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-2,
        "rope_scaling": None,
        "rope_theta": 500.0,
        "rotary_dim": 8,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "topk_group": 2,
        "torch_dtype": "float32",
        "transformers_version": "4.52.3",
        "use_bias": False,
        "use_cache": False,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<|mask|>"}
    return Checkpoint(config, tensors, settings, "<|mask|>")


PUBLISHED: Mapping[str, Callable[[], Checkpoint]] = {
    made.__name__: made
    for made in (sdar, llada2, fast_dllm_v2, llada, llada_moe, dream, a2d_qwen2, a2d_qwen3, a2d_llama, a2d_qwen3_moe)
}
