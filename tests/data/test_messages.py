"""Conversations and tools: as rows hold them, and as a chat template gets them from every door."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dirl
from dirl.data.data_config import DataSource
from dirl.data.document_source import open_documents
from dirl.data.messages import read_messages, read_tools, text_of_content
from dirl.data.problem_sources import load_problems
from dirl.data.problems import Problem, problem_from_row
from dirl.data.rows import DataError
from dirl.data.tasks import tiny_tokenizer
from dirl.errors import UserError
from dirl.eval.benchmarks import Benchmark
from dirl.eval.eval_config import Mode
from dirl.eval.evaluate import Evaluator
from dirl.reward.rubric import RewardConfig, Rubric
from dirl.rl.rollout_group import render_prompts
from dirl.rollout.engine import SamplingConfig
from dirl.rollout.scoring import score
from tests.eval.scripted_engine import ScriptedEngine

TOKENIZER = tiny_tokenizer()
CALLING = tiny_tokenizer()  # its template shows tools and calls
CALLING.chat_template = (
    "{% for tool in tools or [] %}[{{ tool | tojson }}]{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}({{ call.function.name }}){% endfor %}"
    "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "\\boxed{2}"},
    {"role": "user", "content": "And 2+2="},
]


def expected(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    return [int(token) for token in ids]


def test_a_content_is_a_text_or_parts_of_one() -> None:
    assert text_of_content("a b") == "a b"
    assert text_of_content([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]) == "a b"
    for content, words in (
        (None, "has the content None; expected a text, or a list of text parts"),
        ([{"type": "image", "url": "x"}], "has the content part {'type': 'image'"),
        ([{"type": "text", "text": 3}], "has the content part"),
        (["a"], "has the content part 'a'"),
        ("\ud800", "no valid Unicode"),
    ):
        with pytest.raises(UserError, match=words):
            text_of_content(content)


def test_nulls_of_a_table_are_left_out_and_calls_need_no_content() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": None}}, "id": None}
    said = {"role": "assistant", "content": None, "name": None, "tool_calls": [call]}
    assert read_messages("messages", [said]) == [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    ]


def test_tools_are_schemas_or_their_text() -> None:
    assert read_tools([{**TOOL, "strict": None}]) == read_tools(json.dumps([TOOL])) == [TOOL]
    for nothing in (None, [], "", "[]"):
        assert read_tools(nothing) is None
    for value in ("hammer", {"a": 1}, ["hammer"], 3):
        with pytest.raises(UserError, match=r"has tools=.*; expected a list of JSON schemas; rename a column"):
            read_tools(value)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], r"has prompt=\[\]; expected a non-empty list"),
        (["hello"], "has the message 'hello'; expected a role"),
        ([{"role": "user", "content": 3}], "has the content 3"),
        (TURNS[:3], "has a prompt that ends with .*; expected a question, of role user"),
        ([{"role": "user", "content": " "}], "has a prompt that ends with"),
    ],
)
def test_prompts_that_ask_nothing_are_bad_rows(prompt: Any, words: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": TURNS, "answer": 4}) + "\n" + json.dumps({"prompt": prompt, "answer": 4}))
    with pytest.raises(DataError, match=rf"p\.jsonl row 2 {words}"):
        load_problems(str(file))
    assert len(load_problems(str(file), skip_bad_rows=True)) == 1


def test_rl_prompts_are_what_the_template_makes_of_the_conversation(tmp_path: Path) -> None:
    """From JSON lines and from parquet, whose structs have every key in every message."""
    from pyarrow import Table, parquet

    parts = [*TURNS[:3], {"role": "user", "content": [{"type": "text", "text": "And 2+2="}]}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": parts, "answer": 4, "tools": [TOOL], "level": 1}))
    named = [{**message, "name": "dirl" if message["role"] == "system" else None} for message in TURNS]
    rows = Table.from_pylist([{"prompt": named, "answer": "4", "tools": json.dumps([TOOL]), "level": 1}])
    parquet.write_table(rows, tmp_path / "p.parquet")
    for name in ("p.jsonl", "p.parquet"):
        (problem,) = load_problems(str(tmp_path / name))
        assert (problem.question, problem.answer, problem.columns["level"]) == ("And 2+2=", "4", 1)
        (prompt,), _ = render_prompts([problem], CALLING, system_prompt="not this", suffix="!", max_length=1000)
        asked = [*TURNS[:3], {"role": "user", "content": "And 2+2=!"}]
        assert prompt.token_ids == expected(CALLING, asked, [TOOL])
        assert "add" in prompt.text and prompt.text.endswith("<|user|>And 2+2=!<|assistant|>")
    bare = problem_from_row({"question": TURNS[1:], "ground_truth_answer": "4"})
    (prompt,), _ = render_prompts([bare], TOKENIZER, system_prompt="first", suffix="", max_length=1000)
    assert prompt.token_ids == expected(TOKENIZER, [{"role": "system", "content": "first"}, *TURNS[1:]])


def test_tools_that_the_template_leaves_out_are_refused() -> None:
    problem = Problem("1+1=", "2", {"tools": [TOOL]})
    render_prompts([problem], CALLING, system_prompt="", suffix="", max_length=1000)
    with pytest.raises(DataError, match="the chat template leaves tools out; remove them"):
        render_prompts([problem], TOKENIZER, system_prompt="", suffix="", max_length=1000)


def test_rewards_get_the_last_turn_as_question_and_the_whole_as_prompt() -> None:
    seen: dict[str, Any] = {}

    def look(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        seen.update(prompts=prompts, question=columns["question"])
        return [1.0] * len(completions)

    problem = problem_from_row({"prompt": TURNS, "answer": "4"})
    (prompt,), _ = render_prompts([problem], TOKENIZER, system_prompt="", suffix="!", max_length=1000)
    completions = ScriptedEngine(TOKENIZER, lambda *_: "4").generate([prompt.token_ids], SamplingConfig(), [0])
    with Rubric(RewardConfig()) as rubric:
        rubric.functions["accuracy"] = look
        score(rubric, [problem], completions, prompts=[prompt.text], max_completion_length=99)
    said = "<|system|>Be brief.<|user|>1+1=<|assistant|>\\boxed{2}<|im_end|><|user|>And 2+2=!<|assistant|>"
    assert seen == {"prompts": [said], "question": ["And 2+2="]}


def test_an_evaluation_tells_conversations_of_one_last_turn_apart() -> None:
    problems = [
        problem_from_row({"prompt": TURNS, "answer": "4"}),
        problem_from_row({"prompt": "And 2+2=", "answer": 4}),
    ]
    asked: list[str] = []

    def script(prompt: str, *_: Any) -> str:
        asked.append(prompt)
        return "\\boxed{4}"

    with Rubric(RewardConfig()) as rubric:
        evaluator = Evaluator(ScriptedEngine(TOKENIZER, script), TOKENIZER, rubric)
        assert evaluator.evaluate(problems, Mode("m", SamplingConfig(), 2))[0].avg_at_k == 1.0
    assert asked == ["Be brief.1+1=\\boxed{2}And 2+2="] * 2 + ["And 2+2="] * 2
    other = problem_from_row({"prompt": TURNS[1:], "answer": "4"})
    digests = {Benchmark("b", [problem]).digest for problem in [*problems, other]}
    assert len(digests) == 3


def test_generate_takes_questions_conversations_and_ids() -> None:
    model, tokenizer = dirl.tiny()
    tokenizer.chat_template = CALLING.chat_template
    ids = expected(tokenizer, TURNS, [TOOL])
    how: dict[str, Any] = {"max_completion_length": 8, "temperature": 0.0}
    for prompts in (TURNS, [TURNS], [ids]):
        (completion,) = dirl.generate(model, tokenizer, prompts, tools=[TOOL], **how)
        assert completion.prompt_ids == ids
    two = dirl.generate(model, tokenizer, ["1+1=", [TURNS[1]]], **how)
    assert two[0].prompt_ids == two[1].prompt_ids == expected(tokenizer, [TURNS[1]])
    with pytest.raises(UserError, match="has a prompt that ends with"):
        dirl.generate(model, tokenizer, TURNS[:3], **how)


def test_sft_rows_of_conversations_and_tools(tmp_path: Path) -> None:
    """Prompt and completion as messages are the conversation that they make together; only the latter is learned."""
    answer = {"role": "assistant", "content": "\\boxed{4}"}
    rows = [
        {"prompt": TURNS, "completion": [answer]},
        {"prompt": TURNS, "completion": answer["content"]},
        {"prompt": TURNS[3]["content"], "completion": [answer]},
        {"messages": [*TURNS, answer], "tools": json.dumps([TOOL])},
        {"prompt": TURNS, "completion": answer["content"], "tools": [TOOL]},
    ]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_documents(DataSource(path=str(file)), CALLING)
    documents = [source[index] for index in range(len(source))]
    prompts = [document.prompt_ids for document in documents if document]
    plain, tooled = expected(CALLING, TURNS), expected(CALLING, TURNS, [TOOL])
    first_turn = expected(CALLING, TURNS[:2], [TOOL])
    assert prompts == [plain, plain, expected(CALLING, TURNS[3:]), first_turn, tooled, tooled]
    learned = [CALLING.decode(document.completion_ids) for document in documents if document]
    assert learned == ["\\boxed{4}<|im_end|>"] * 3 + ["\\boxed{2}<|im_end|>"] + ["\\boxed{4}<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": [], "completion": "a"}, r"has prompt=\[\]"),
        ({"prompt": TURNS, "completion": []}, r"has completion=\[\]"),
        ({"prompt": TURNS, "completion": TURNS[:1]}, "has no assistant message to learn from"),
        ({"prompt": "q", "completion": "a", "tools": "hammer"}, "has tools='hammer'"),
        ({"text": ["a"]}, r"has text=\['a'\]"),
    ],
)
def test_bad_sft_rows_of_conversations(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(DataError, match=rf"d\.jsonl row 1 {words}"):
        open_documents(DataSource(path=str(file)), CALLING)
