"""SFT rows -> documents, the prompt stream, and the procedural task."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dirl.data.chat import decode, load_tokenizer, stop_token_ids
from dirl.data.conversations import Document
from dirl.data.data_config import DataSource
from dirl.data.document_source import open_documents
from dirl.data.problem_sources import load_problems
from dirl.data.prompt_stream import PromptStream
from dirl.data.rows import DataError
from dirl.data.tasks import noisy_sums_demonstrations, noisy_sums_problems, tiny_tokenizer

SHARED = Path(__file__).parents[2] / ".." / "shared"


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_documents(path: str, tokenizer: Any, **settings: Any) -> list[Document]:
    """All documents of a path, drawn one after another."""
    source = open_documents(DataSource(path=path, limit=settings.pop("limit", 0)), tokenizer, **settings)
    return [document for index in range(len(source)) if (document := source[index]) is not None]


def test_three_forms_of_row(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b"}]
    rows = [{"prompt": "q", "completion": "a b"}, {"prompt": "q", "response": "a b"}, {"messages": messages}]
    first, *others = read_documents(write(tmp_path / "d.jsonl", rows), tokenizer)
    assert all(document == first for document in others) and len(others) == 2
    assert tokenizer.decode(first.prompt_ids) == "<|user|>q<|assistant|>"
    assert tokenizer.decode(first.completion_ids) == "a b<|im_end|>"


def test_a_completion_with_the_mask_token_is_a_bad_row(tmp_path: Path) -> None:
    """A model never writes it: its loss would be infinite."""
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": f"a {tokenizer.mask_token} b"}]
    path = write(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError, match=r"d\.jsonl.*2.*has the mask token in its completion"):
        read_documents(path, tokenizer)
    assert len(read_documents(path, tokenizer, skip_bad_rows=True)) == 1


def test_each_assistant_turn_is_a_document(tmp_path: Path) -> None:
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    tokenizer = tiny_tokenizer()
    documents = read_documents(write(tmp_path / "d.jsonl", [{"messages": messages}]), tokenizer)
    assert [tokenizer.decode(d.completion_ids) for d in documents] == ["1<|im_end|>", "3<|im_end|>"]
    assert tokenizer.decode(documents[1].prompt_ids) == "<|user|>0<|assistant|>1<|im_end|><|user|>2<|assistant|>"


def test_bad_forms_are_named_before_anything_is_tokenised(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a" * length} for length in (3, 50)]
    path = write(tmp_path / "d.jsonl", [*rows, {"prompt": "", "completion": "a"}])
    with pytest.raises(DataError, match=r"d\.jsonl row 3 .*prompt=''"):
        open_documents(DataSource(path=path), tiny_tokenizer())
    assert len(open_documents(DataSource(path=path), tiny_tokenizer(), skip_bad_rows=True)) == 2


def test_a_text_is_a_document_without_a_prompt(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = write(tmp_path / "d.jsonl", [{"text": "a b"}, {"text": "<|user|>q<|assistant|>a<|im_end|>", "id": 7}])
    plain, rendered = read_documents(path, tokenizer, system_prompt="not for texts")
    assert plain.prompt_ids == rendered.prompt_ids == []
    assert tokenizer.decode(plain.completion_ids) == "a b<|im_end|>"
    assert tokenizer.decode(rendered.completion_ids) == "<|user|>q<|assistant|>a<|im_end|>"
    for row, words in (({"text": " "}, "text=' '"), ({"text": f"a{tokenizer.mask_token}"}, "has the mask token")):
        with pytest.raises(DataError, match=rf"row 1 has {words}|row 1 {words}"):
            open_documents(DataSource(path=write(tmp_path / "d.jsonl", [row])), tokenizer)


def test_a_completion_is_never_cut_at_a_stop_token_within(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = write(tmp_path / "d.jsonl", [{"prompt": "q", "completion": "one<|im_end|>\n"}])
    (document,) = read_documents(path, tokenizer)
    assert tokenizer.decode(document.completion_ids) == "one<|im_end|>"
    for row in (
        {"prompt": "q", "completion": "one<|endoftext|>two"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "one<|im_end|>two"}]},
    ):
        with pytest.raises(DataError, match=r"d\.jsonl row 1 has text after the token that ends a turn: 'two'"):
            read_documents(write(tmp_path / "d.jsonl", [row]), tokenizer)


def test_system_prompt_and_rows_that_bring_their_own(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"prompt": "q", "completion": "a"}, {"messages": turns}]
    rows.append({"messages": [{"role": "system", "content": "own"}, *turns]})
    tokenizer = tiny_tokenizer()
    documents = read_documents(write(tmp_path / "d.jsonl", rows), tokenizer, system_prompt="given")
    prompts = [tokenizer.decode(document.prompt_ids) for document in documents]
    assert prompts == [f"<|system|>{text}<|user|>q<|assistant|>" for text in ("given", "given", "own")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q"}, "columns prompt; expected messages"),
        ({"prompt": "q", "completion": 3}, "completion=3"),
        ({"messages": []}, r"messages=\[\]"),
        ({"messages": [{"from": "human", "value": "q"}]}, "expected a role and a text content"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant message"),
        ({"messages": [{"role": "tool", "content": "q"}, {"role": "assistant", "content": "a"}]}, "unknown role tool"),
    ],
)
def test_bad_conversations_are_named(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "q", "completion": "a"}, row])
    with pytest.raises(DataError, match=rf"d\.jsonl row 2 .*{words}") as caught:
        read_documents(path, tiny_tokenizer())
    assert "\n" not in str(caught.value)
    assert len(read_documents(path, tiny_tokenizer(), skip_bad_rows=True)) == 1


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match=r"row 1 renders differently as a prompt and as a whole"):
        read_documents(write(tmp_path / "d.jsonl", [{"messages": messages}]), tokenizer)


def test_the_real_tokenizer() -> None:
    if not (SHARED / "tokenizer").is_dir():
        pytest.skip("the tokenizer of SDAR is not beside the repository")
    tokenizer = load_tokenizer(SHARED / "tokenizer")
    data = SHARED / "data" / "GSM8K_sft.json"
    if not data.is_file():
        pytest.skip("GSM8K is not beside the repository")
    documents = read_documents(str(data), tokenizer, limit=50)
    assert len(documents) == 50
    for document in documents:
        assert document.completion_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert sum(token in stop_token_ids(tokenizer) for token in document.completion_ids) == 1
        assert "\\boxed{" in decode(tokenizer, document.completion_ids)


def test_problems_in_both_forms(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "ground_truth_answer": 18.0, "level": 3},
        {"prompt": "q", "solution": "so \\boxed{\\frac{1}{2}}"},
    ]
    first, second = load_problems(write(tmp_path / "p.jsonl", rows))
    assert (first.answer, first.columns, second.answer) == ("18", {"level": 3}, "\\frac{1}{2}")
    with pytest.raises(DataError, match=r"p\.jsonl row 2 .*answer=None"):
        load_problems(write(tmp_path / "p.jsonl", [rows[0], {"prompt": "q", "answer": None}]))


def test_prompt_stream_is_a_permutation_an_epoch_and_resumes() -> None:
    stream = PromptStream(7, seed=3)
    taken = stream.take(10)
    state = stream.state_dict()
    rest = stream.take(11)
    epochs = [(taken + rest)[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    resumed = PromptStream(7, seed=3)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert resumed.take(11) == rest
    with pytest.raises(ValueError, match="num_items=7"):
        PromptStream(8, seed=3).load_state_dict(state)


def test_the_task_has_an_imperfect_teacher_and_true_answers() -> None:
    train = noisy_sums_problems(2000, 0, "train")
    heldout = noisy_sums_problems(320, 0, "heldout")
    for problem in (*train, *heldout):
        assert eval_sum(problem.question) == int(problem.answer)
    assert not {p.question for p in train} & {p.question for p in heldout}
    assert len({p.question for p in heldout}) == 320
    for problems in (train, heldout):
        assert sum(p.question.count("+") == 2 for p in problems) == len(problems) // 2
    written = wrong = 0
    for row in noisy_sums_demonstrations(3000, 0):
        for a, b, result in re.findall(r"(\d+)\+(\d+)=(\d+);", row["completion"]):
            written += 1
            wrong += int(a) + int(b) != int(result)
    assert 0.13 < wrong / written < 0.17
    assert not {row["prompt"] for row in noisy_sums_demonstrations(3000, 0)} & {p.question for p in heldout}


def test_a_wrong_step_is_carried_on() -> None:
    for row in noisy_sums_demonstrations(500, 0, error_rate=0.5):
        terms = row["prompt"].removesuffix("=").split("+")
        *steps, box = row["completion"].split(";")
        written = terms[0]
        for term, step in zip(terms[1:], steps, strict=True):
            left, result = step.split("=")
            assert left == f"{written}+{term}" and int(result) >= 0
            written = result
        assert box == f"\\boxed{{{written}}}"
    for row in noisy_sums_demonstrations(100, 0, error_rate=0.0):
        assert row["completion"].endswith(f";\\boxed{{{eval_sum(row['prompt'])}}}")


def test_the_tiny_tokenizer_encodes_any_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in ("9+7=16;\\boxed{24}", "naïve 数学 🙂\n\tx", " leading and trailing "):
        assert again.encode(text) == tokenizer.encode(text)
        assert decode(again, again.encode(text)) == text
    assert again.mask_token_id == len(again) - 1 and len(again.encode("\\boxed{")) == 1


def eval_sum(question: str) -> int:
    return sum(int(term) for term in question.removesuffix("=").split("+"))
