"""Chat templates that hang, take all memory or build a huge text are refused in one line; honest ones are unchanged."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from dirl.data import template_trial
from dirl.data.chat import load_tokenizer, render_messages, render_prompt, save_tokenizer
from dirl.data.rows import DataError
from dirl.data.tasks import tiny_tokenizer
from dirl.data.template_child import compiled
from dirl.data.template_trial import Trial

SHARED = Path(__file__).parents[2] / ".." / "shared"
SAID = "{{ messages[0].content }}"
HARMFUL = {
    "endless": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "1 s of processor"),
    "repeated": ("{{ 'a' * 10**11 }}", "1024 MiB of memory"),
    "padded": ("{{ '%99999999999d' % 1 }}", "1024 MiB of memory"),
    "doubled": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "(1024 MiB of memory|1 s of processor)",  # whichever comes first
    ),
    "long": ("{{ 'a' * 10**7 }}", "makes too long a text"),
    "growing": ("{% for m in messages %}{{ m.content * 50 }}{% endfor %}", "makes too long a text"),
    "only with tools": ("{% if tools %}{{ 'a' * 10**11 }}{% endif %}", "1024 MiB of memory"),
    "only unended": ("{% if add_generation_prompt %}{{ 'a' * 10**7 }}{% endif %}", "makes too long a text"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_template_is_refused_with_its_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_trial, "_SECONDS", 1)
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = "strange/model"
    template, words = HARMFUL[name]
    tokenizer.chat_template = template + SAID
    with pytest.raises(DataError, match=rf"^the chat template of strange/model .*{words}.*; it is broken or hostile"):
        render_prompt(tokenizer, "q")


def test_a_tokenizer_is_named_by_its_folder_and_tried_once(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'b' * 10**7 }}" + SAID
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=f"the chat template of {tmp_path} makes too long"):
        render_prompt(loaded, "q")
    began = time.process_time()
    for _ in range(20):
        with pytest.raises(DataError, match="makes too long"):
            render_prompt(loaded, "q")
    assert time.process_time() - began < 1


def test_a_text_out_of_proportion_is_refused_wherever_it_comes_up() -> None:
    """What a trial does not see: the template waits for a word."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if 'now' in messages[0].content %}{{ 'x' * 10**7 }}{% endif %}" + SAID
    assert render_prompt(tokenizer, "later")
    with pytest.raises(DataError, match="makes 10000003 characters of the conversation, at most 100"):
        render_prompt(tokenizer, "now")
    assert len(render_prompt(tokenizer, "y" * 200_000)) == 200_000


@pytest.mark.parametrize("template", ["{{ f }}{% macro f(n) %}{{ g(n) }}{% endmacro %}{{ f(1) }}", "{{ 'a'[3:] + 1 }}"])
def test_a_template_that_fails_says_so(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"the chat template (fails at|refuses) the conversation: "):
        render_prompt(tokenizer, "q")


def test_a_trial_that_cannot_be_held_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child.py").write_text("raise SystemExit('no jinja2')")
    monkeypatch.setattr(template_trial, "_PROGRAM", tmp_path / "child.py")
    assert Trial(SAID, {}).fault == "could not be tried: no jinja2"


def templates() -> dict[str, Any]:
    """A tokenizer of each template there is, SDAR's where it lies beside the repository."""
    marked = tiny_tokenizer()
    marked.chat_template = (
        "{% for m in messages %}\n  {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m.role }}: {{ m | tojson(indent=2) }}{{ eos_token }}{% endgeneration %}\n{% endfor %}"
        "{{ tools | tojson if tools }}{{ strftime_now('%Y') }}"
    )
    found = {"tiny": tiny_tokenizer(), "marked": marked}
    return found | ({"sdar": load_tokenizer(SHARED / "tokenizer")} if (SHARED / "tokenizer").is_dir() else {})


def test_a_trial_renders_what_transformers_renders() -> None:
    turns = [{"role": role, "content": f"é {role}"} for role in ("system", "user", "assistant", "user")]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for name, tokenizer in templates().items():
        assert Trial(tokenizer.chat_template, tokenizer.special_tokens_map).fault == ""
        for tools in (None, [tool]):
            how: dict[str, Any] = {"messages": turns, "tools": tools, "documents": None, "add_generation_prompt": True}
            text = compiled(tokenizer.chat_template).render(**tokenizer.special_tokens_map, **how)
            rendered = tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True, tokenize=False)
            assert text == rendered, name
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        if name != "marked":  # which leaves system messages out
            assert render_messages(tokenizer, turns, add_generation_prompt=True) == ids


def test_processes_forked_amid_a_trial_make_their_own() -> None:
    """Its pipes are the parent's: two that read them would each have a part, and the parent nothing."""
    trial = Trial("{{ messages[0].content }}", {})
    for _ in range(2):
        if not (child := os.fork()):
            os._exit(0 if trial.fault == "" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert trial.fault == ""
