"""Questions and conversations -> token ids, and token ids -> text: the only door to transformers' tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dirl.data.messages import Message, Tool
from dirl.data.rows import DataError
from dirl.data.template_trial import Trial, longest_text, trial_of
from dirl.errors import one_line
from dirl.files import expand, is_hub_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MASK_TOKEN = "<|MASK|>"  # not "<MASK>", which the SDAR vocabulary reads as three ordinary tokens
# What families call their mask, where the tokenizer does not say which token it is.
MASK_TOKENS = (MASK_TOKEN, "<|mask|>", "|<MASK>|", "<|mdm_mask|>")
# Tokens that vocabularies keep free, such as Llama's <|reserved_special_token_0|>.
RESERVED = re.compile(r"^<\|?(reserved_special_token|reserved|unused|extra_id)_?\d+\|?>$")
# SDAR's eos_token; its chat template's; then the ends of a turn in LLaDA, LLaDA2 and Llama.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|role_end|>", "<|end_of_text|>")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local Hugging Face directory or of a hub id; code in the checkpoint is never run.

    Raises:
        DataError: there is no tokenizer at `path`.
    """
    tokenizer = _load(path)
    if isinstance(tokenizer.chat_template, str):
        _trial(tokenizer, tokenizer.chat_template)  # while the model loads
    return tokenizer


def _load(path: str | Path) -> PreTrainedTokenizerBase:
    directory = expand(path)
    if directory.suffix == ".gguf":
        return _load_from_gguf(directory)
    is_on_hub = is_hub_id(str(path))
    if not is_on_hub and not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise DataError(f"no tokenizer at {path}: expected a directory holding tokenizer.json or tokenizer_config.json")
    source = str(path) if is_on_hub else str(directory)
    try:
        return _load_without_code(source)
    except Exception as error:  # libraries fail in many ways on damaged files; it stays the cause
        raise DataError(f"cannot load a tokenizer from {path}: {one_line(error, 200)}") from error


def _load_from_gguf(file: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (OSError, ValueError, KeyError, ImportError) as error:  # the last: no gguf package
        raise DataError(f"cannot load a tokenizer from {file}: {one_line(error, 200)}") from error


def _load_without_code(source: str) -> PreTrainedTokenizerBase:
    """What AutoTokenizer loads, without its question on the terminal whether to run the code that a checkpoint names.

    A class of its own (Dream's) is left out: where there is a tokenizer.json, that says all there is to say; vocab.json
    and merges.txt without one are Qwen2's.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils import cached_file

    if "auto_map" not in get_tokenizer_config(source):
        return AutoTokenizer.from_pretrained(source, config=_config_of_stranger(source), trust_remote_code=False)
    is_whole = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is not None
    tokenizer = (PreTrainedTokenizerFast if is_whole else Qwen2Tokenizer).from_pretrained(source)
    tokenizer.init_kwargs.pop("auto_map", None)  # saved again, it would name code that is not there
    return tokenizer


def _config_of_stranger(source: str) -> Any:
    """An empty configuration for a model that transformers does not know, and would warn of; None: let it look."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    try:
        settings, _ = PreTrainedConfig.get_config_dict(source)
    except OSError:  # no config.json: a tokenizer alone
        return None
    return None if settings.get("model_type") in CONFIG_MAPPING else PreTrainedConfig()


def add_mask_token(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> int:
    """Give an autoregressive model's tokenizer a mask token, in place; its id.

    The one it has, or the last id that was reserved and never used, or MASK_TOKEN as the first id after all others.

    Args:
        num_rows: of the model's embeddings; ids from there on mean nothing to it.
    """
    found = find_mask_token_id(tokenizer)
    if found is None:
        reserved = sorted((token_id, text) for text, token_id in tokenizer.get_vocab().items() if RESERVED.search(text))
        text = next((text for token_id, text in reversed(reserved) if token_id < num_rows), MASK_TOKEN)
        tokenizer.add_special_tokens({"mask_token": text})
        found = mask_token_id(tokenizer)
    return found


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Write the tokenizer, chat template included, beside a model's weights."""
    tokenizer.save_pretrained(str(path))


def wrap_tokenizer(
    backend: Tokenizer, *, eos_token: str, pad_token: str, mask_token: str, chat_template: str
) -> PreTrainedTokenizerFast:
    """A `tokenizers` backend -> a transformers tokenizer that save_tokenizer and load_tokenizer round-trip."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos_token,
        pad_token=pad_token,
        mask_token=mask_token,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    *,
    system_prompt: str = "",
    suffix: str = "",
    tools: Sequence[Tool] | None = None,
) -> list[int]:
    """Token ids of a question, or of a conversation that ends in one: everything up to the first token of the answer.

    Args:
        system_prompt: opens what brings none of its own; "": none.
        suffix: appended to the question as it stands, such as "\\nPut your final answer within \\\\boxed{}."
    """
    *earlier, last = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [*earlier, {**last, "content": f"{last['content']}{suffix}"}]
    messages = with_system_prompt(messages, system_prompt=system_prompt)
    return render_messages(tokenizer, messages, tools=tools, add_generation_prompt=True)


def with_system_prompt(messages: Sequence[Message], *, system_prompt: str) -> list[Message]:
    """The messages, opened by `system_prompt` ("": none) where they bring no system message of their own."""
    if not system_prompt or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    add_generation_prompt: bool,
) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template.

    Args:
        tools: that the model may call; None: none.
    Raises:
        DataError: the tokenizer has no chat template, its template is not bounded, refuses the conversation or leaves
            messages or tools out, or the mask token stands in it.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; add one to it"
        )
    template = tokenizer.get_chat_template(tools=tools)  # type: ignore[arg-type]
    if fault := _trial(tokenizer, template).fault:
        raise DataError(f"the chat template of {tokenizer.name_or_path or 'this tokenizer'} {fault}")
    for role in {str(message["role"]) for message in messages}:
        _check_shown(tokenizer, template, role)
    if tools:
        _check_shown(tokenizer, template, None)
    try:
        text: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=tools,  # type: ignore[arg-type]
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses the conversation: {error}") from error
    except Exception as error:  # it is a stranger's program, and fails in any way
        raise DataError(f"the chat template fails at the conversation: {one_line(error, 200)}") from error
    if len(text) > (most := longest_text(messages, tools)):
        raise DataError(f"the chat template makes {len(text)} characters of the conversation, at most {most} may be")
    return check_unmasked(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


@lru_cache(maxsize=256)
def _trial(tokenizer: PreTrainedTokenizerBase, template: str) -> Trial:
    return trial_of(template, json.dumps(tokenizer.special_tokens_map, default=str))


@lru_cache(maxsize=256)
def _check_shown(tokenizer: PreTrainedTokenizerBase, template: str, role: str | None) -> None:
    """Raises DataError where the chat template says nothing of messages of this role; None: of tools."""
    user, asked, tools = {"role": "user", "content": "a"}, {"role": role or "user", "content": "dirl asks"}, None
    if role is None:
        tools, asked["content"] = [{"type": "function", "function": {"name": "dirl asks", "parameters": {}}}], "b"
    for said in ([asked], [user, asked], [asked, user]):
        try:
            text = str(tokenizer.apply_chat_template(said, tools=tools, chat_template=template, tokenize=False))  # type: ignore[arg-type]
        except Exception:  # of a conversation like this one; what it says of the real one is heard there
            return
        if "dirl asks" in text:
            return
    if role is None:
        raise DataError("the chat template leaves tools out; remove them, or use a model that calls tools")
    raise DataError(f"the chat template leaves out messages of role {role!r}; name the role as the template does")


def check_unmasked(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """The ids. Raises DataError where a text brought the mask token, which a model would be asked to fill in."""
    mask = find_mask_token_id(tokenizer)
    if mask is not None and mask in ids:
        raise DataError(f"holds the mask token, {tokenizer.convert_ids_to_tokens(mask)}; write it otherwise")
    return list(ids)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text as it stands, with what the tokenizer itself puts before it; in no template."""
    return check_unmasked(tokenizer, tokenizer.encode(text))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids for people and reward functions: special tokens left out, spaces untouched."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def prompt_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of a rendered prompt for reward functions, with the marks of its template."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def token_texts(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]]) -> list[list[str]]:
    """What each token reads, special tokens included; for people, not for putting a text together.

    A character of several tokens stands at the last of them, and the others are empty.
    """
    known: dict[tuple[int, ...], str] = {}

    def read(*ids: int) -> str:
        if ids not in known:
            known[ids] = str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        return known[ids]

    return [_joined_characters(ids, read) for ids in sequences]


def _joined_characters(ids: Sequence[int], read: Callable[..., str]) -> list[str]:
    texts = [read(token) for token in ids]
    start = 0  # of the tokens that may be parts of one character
    for index, text in enumerate(texts):
        if "\ufffd" not in text:
            start = index + 1
            continue
        for first in range(max(start, index - 3), index):  # UTF-8 has four bytes at most
            joined = read(*ids[first : index + 1])
            if "\ufffd" not in joined:
                texts[first : index + 1] = ["" for _ in range(first, index)] + [joined]
                start = index + 1
                break
    return texts


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: the eos token first, then the END_TOKENS of the vocabulary.

    Raises:
        DataError: there is none.
    """
    candidates = [tokenizer.eos_token_id, *(_token_id(tokenizer, token) for token in END_TOKENS)]
    ids = list(dict.fromkeys(int(token_id) for token_id in candidates if token_id is not None))
    if not ids:
        raise DataError(f"the tokenizer has no eos token and none of {', '.join(END_TOKENS)}; set its eos_token")
    return ids


def mask_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the mask token: the one the tokenizer declares, or else one of MASK_TOKENS in its vocabulary.

    Raises:
        DataError: there is none, so the model is no diffusion model.
    """
    token_id = find_mask_token_id(tokenizer)
    if token_id is None:
        raise DataError(
            f"the tokenizer declares no mask_token and has none of {', '.join(MASK_TOKENS)}; "
            "use the tokenizer of a diffusion model"
        )
    return token_id


def find_mask_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """As `mask_token_id`; None where there is none."""
    names = [str(tokenizer.mask_token), *MASK_TOKENS] if tokenizer.mask_token else MASK_TOKENS
    found = (_token_id(tokenizer, name) for name in names)
    return next((token_id for token_id in found if token_id is not None), None)


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """Id of a token of the vocabulary; None where it is absent (transformers itself answers with the unk token)."""
    token_id: Any = tokenizer.convert_tokens_to_ids(token)
    return token_id if token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == token else None
