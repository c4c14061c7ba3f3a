"""Other people's clients against `dirl serve MODEL`: OpenAI's own, and lm_eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dirl.data.chat import decode, encode, render_prompt
from dirl.data.tasks import noisy_sums_problems
from dirl.model.checkpoint import save_model
from dirl.rollout.engine import SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.server.wire import KEY_VARIABLE, PARENT_VARIABLE
from tests.oracle import sharp_tiny_model
from tests.rollout.server.serving import KEY
from tests.rollout.server.test_api import wait_until

pytestmark = pytest.mark.matrix

MODEL, TOKENIZER = sharp_tiny_model()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The name of a model and the address of the process that serves it, which no YAML file configures."""
    directory = tmp_path_factory.mktemp("served")
    save_model(MODEL, TOKENIZER, directory / "model")
    ready, log = directory / "address", directory / "log"
    command = [sys.executable, "-m", "dirl.cli", "serve", str(directory / "model"), "port=0", f"ready_file={ready}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "engine.engine=torch"],
            env=os.environ | {KEY_VARIABLE: KEY, PARENT_VARIABLE: str(directory / "none")},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    try:
        wait_until(lambda: process.poll() is not None or (ready.is_file() and ready.read_text()))
        assert process.poll() is None, log.read_text()
        yield str(directory / "model"), ready.read_text()
    finally:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=30) == 0, log.read_text()


MAX_TOKENS = 30


def expected(prompt: list[int], seed: int = 0, **sampling: Any) -> str:
    """The text of MAX_TOKENS tokens from the engine in this process, which decodes whole blocks."""
    config = SamplingConfig(max_completion_length=MAX_TOKENS + 3, **sampling)
    (completion,) = TorchEngine(MODEL, TOKENIZER).generate([prompt], config, [seed])
    ended = completion.finish_reason == "stop" and completion.completion_length <= MAX_TOKENS
    return completion.text if ended else decode(TOKENIZER, completion.token_ids[:MAX_TOKENS])


def test_openai(served: tuple[str, str]) -> None:
    openai = pytest.importorskip("openai", reason="needs openai: pip install openai")
    name, url = served
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == [name]
    asks: dict[str, Any] = {
        "model": name,
        "seed": 4,
        "max_tokens": MAX_TOKENS,
        "extra_body": {"confidence_threshold": 0.1},
    }
    messages = [{"role": "user", "content": "1+2="}]
    text = expected(render_prompt(TOKENIZER, "1+2="), 4, confidence_threshold=0.1)
    whole = client.chat.completions.create(messages=messages, logprobs=True, n=2, **asks)
    assert whole.choices[0].message.content == text
    assert len(whole.choices[0].logprobs.content) > 1
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **asks))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    plain = client.completions.create(prompt=["1+2=", "3+4="], logprobs=1, **asks)
    for choice, prompt in zip(plain.choices, ("1+2=", "3+4="), strict=True):
        assert choice.text == expected(encode(TOKENIZER, prompt), 4, confidence_threshold=0.1)
    with pytest.raises(openai.BadRequestError, match="echo with logprobs is not supported") as refused:
        client.completions.create(prompt="1+2=", echo=True, logprobs=1, **asks)
    assert refused.value.param == "echo"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(prompt="1+2=", model="other")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()


TASK = """\
task: tiny_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 30, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.parametrize("is_chat", [True, False])
def test_lm_eval(served: tuple[str, str], is_chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are those of the engine in this process."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'lm-eval[api]'")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    name, url = served
    problems = noisy_sums_problems(12, 0, "heldout")
    rows = [{"question": problem.question, "answer": problem.answer} for problem in problems]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(TASK.format(data=tmp_path / "sums.jsonl"))
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    results = lm_eval.simple_evaluate(
        model="local-chat-completions" if is_chat else "local-completions",
        model_args={
            "model": name,
            "base_url": url + path,
            "num_concurrent": 4,
            "max_retries": 1,
            **({"tokenized_requests": False} if is_chat else {"tokenizer": name, "tokenizer_backend": "huggingface"}),
        },
        tasks=["tiny_sums"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=is_chat,
        bootstrap_iters=0,
    )
    samples = results["samples"]["tiny_sums"]
    assert len(samples) == 12
    for sample in samples:
        question = sample["doc"]["question"]
        prompt = render_prompt(TOKENIZER, question) if is_chat else encode(TOKENIZER, question)
        assert sample["resps"][0][0] == expected(prompt, temperature=0).split("\n\n")[0]
