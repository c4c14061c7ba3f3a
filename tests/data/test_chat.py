"""The chat template and the special tokens, with the tiny tokenizer and with SDAR's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dirl.data.chat import (
    MASK_TOKENS,
    decode,
    encode,
    find_mask_token_id,
    load_tokenizer,
    mask_token_id,
    render_messages,
    render_prompt,
    save_tokenizer,
    stop_token_ids,
    token_texts,
)
from dirl.data.rows import DataError
from dirl.data.tasks import tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SDAR_TOKENIZER = Path(__file__).parents[2] / ".." / "shared" / "tokenizer"


@pytest.fixture(scope="module")
def sdar_tokenizer() -> PreTrainedTokenizerBase:
    if not SDAR_TOKENIZER.is_dir():
        pytest.skip("the tokenizer of SDAR is not beside the repository")
    return load_tokenizer(SDAR_TOKENIZER)


def test_prompts_of_sdar(sdar_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = render_prompt(sdar_tokenizer, "1+1?", system_prompt="Be brief.", suffix=" Box it.")
    assert sdar_tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1? Box it.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == 151644 and all(type(token) is int for token in ids)


def test_special_ids_of_sdar(sdar_tokenizer: PreTrainedTokenizerBase) -> None:
    assert mask_token_id(sdar_tokenizer) == 151669
    assert sorted(stop_token_ids(sdar_tokenizer)) == [151643, 151645]


def test_special_ids_of_the_tiny_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    assert mask_token_id(tokenizer) == len(tokenizer) - 1
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == ["<|im_end|>", "<|endoftext|>"]


def test_decoding_drops_special_tokens_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer()
    text = "  two  spaces , don't .\n\\boxed{7}\x00 "
    ids = tokenizer.encode(f"<|user|>{text}<|MASK|><|im_end|>")
    assert tokenizer.decode(ids) == f"<|user|>{text}<|MASK|><|im_end|>"
    assert decode(tokenizer, ids) == text


@pytest.mark.parametrize("model_type", ["sdar", "qwen3"])
def test_a_saved_tokenizer_loads_beside_a_model(model_type: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    loaded = load_tokenizer(tmp_path)
    assert render_prompt(loaded, "q", system_prompt="s") == render_prompt(tokenizer, "q", system_prompt="s")
    assert (loaded.eos_token, loaded.pad_token, loaded.get_vocab()) == (
        "<|im_end|>",
        "<|endoftext|>",
        tokenizer.get_vocab(),
    )


def test_tokenizers_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="refuses the conversation: unknown role tool"):
        render_messages(tokenizer, [{"role": "tool", "content": "x"}], add_generation_prompt=True)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        render_prompt(tokenizer, "q")
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError, match=f"no tokenizer at {path}: expected a directory"):
            load_tokenizer(path)
    for content in ("{", "{}"):  # a download cut short; another file
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=f"cannot load a tokenizer from {tmp_path}"):
            load_tokenizer(tmp_path)


def test_a_vocabulary_without_the_tokens_of_diffusion() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<MASK>": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(DataError, match=r"none of <\|MASK\|>, <\|mask\|>, \|<MASK>\|, <\|mdm_mask\|>; use"):
        mask_token_id(tokenizer)
    assert find_mask_token_id(tokenizer) is None
    with pytest.raises(DataError, match="no eos token"):
        stop_token_ids(tokenizer)


@pytest.mark.parametrize("text", MASK_TOKENS)
def test_the_mask_token_is_the_declared_one_or_else_a_known_one(text: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<MASK>": 0, "[UNK]": 1, text: 2}, unk_token="[UNK]"))
    silent = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    declared = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="<MASK>")
    assert (mask_token_id(silent), mask_token_id(declared)) == (2, 0)


def test_a_character_of_several_tokens_stands_at_the_last() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("aé→b😀")
    texts = token_texts(tokenizer, [ids])[0]
    assert texts == ["a", "", "é", "", "", "→", "b", "", "", "", "😀"]
    assert token_texts(tokenizer, [ids[:2]])[0] == ["a", "\ufffd"]


def test_messages_that_the_template_leaves_out_are_named() -> None:
    tokenizer = tiny_tokenizer()
    known = "m.role in ['user', 'assistant', 'system']"
    tokenizer.chat_template = "{% for m in messages if " + known + " %}{{ m.content }}{% endfor %}"
    for role in ("user", "assistant", "system"):
        render_messages(tokenizer, [{"role": role, "content": "x"}], add_generation_prompt=False)
    with pytest.raises(DataError, match="leaves out messages of role 'human'; name the role as the template does"):
        render_messages(tokenizer, [{"role": "human", "content": "x"}], add_generation_prompt=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    render_messages(tokenizer, [{"role": "human", "content": "x"}], add_generation_prompt=True)


def test_a_text_never_brings_the_mask_token() -> None:
    tokenizer = tiny_tokenizer()
    for make in (render_prompt, encode):
        assert make(tokenizer, "1+1=") and make(tokenizer, "<MASK>")
        with pytest.raises(DataError, match=r"holds the mask token, <\|MASK\|>; write it otherwise"):
            make(tokenizer, "1+<|MASK|>=")
