"""Whatever stands in files, configurations, requests, checkpoints and answers: it is read, or refused in one line."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors

from dirl.config import config_to_dict, load_config
from dirl.data.data_config import DataSource
from dirl.data.document_source import open_documents
from dirl.data.problem_sources import load_problems
from dirl.errors import UserError
from dirl.eval.eval_config import EvalConfig
from dirl.model.checkpoint import load, save_model
from dirl.reward import MathGrader
from dirl.reward.math_answer import Verdict
from dirl.rl.rl_config import RLConfig
from dirl.rollout.engine import SamplingConfig
from dirl.rollout.server.wire import (
    KEY_HEADER,
    CompletionRow,
    GenerateRequest,
    Hold,
    Join,
    PromptRow,
    Push,
    PushedPart,
    key_value,
    read_refusal,
    refusal,
    to_json,
)
from dirl.rollout.weights import kinds_of
from dirl.sft.train import SFTConfig
from dirl.training.full_parameters import named_full_parameters
from dirl.training.run_state import newest_checkpoint, seal
from tests.chaos.conftest import Tally
from tests.rollout.engine_contract import likely_to_stop
from tests.rollout.server.serving import KEY, serving

MODEL, TOKENIZER = likely_to_stop(seed=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def for_each(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], times: int) -> None:
    """Nearly the same examples in every run: constants of the modules that are loaded are among them."""
    how = settings(
        derandomize=True, database=None, deadline=None, max_examples=times, suppress_health_check=list(HealthCheck)
    )
    how(given(strategy)(check))()


def read_or_refused(tally: Tally, act: Callable[[], Any], shown: object, *words: str) -> None:
    """It succeeds, or is one line with these words."""
    try:
        act()
        tally.count(True, "")
    except UserError as error:
        text = str(error)
        is_well = "\n" not in text and all(word in text for word in words)
        tally.count(is_well, f"{shown!r:.300} -> {text[:500]!r}")
    except Exception as error:
        tally.count(False, f"{shown!r:.300} -> {type(error).__name__}: {error!s:.300}")


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": JSON}
    ),
    max_size=4,
)
NAMES = (
    "question",
    "ground_truth_answer",
    "prompt",
    "answer",
    "solution",
    "response",
    "completion",
    "text",
    "messages",
)
NAMES += ("test_method", "problem", "options", "choices", "answerKey", "")
VALUE = (
    JSON | MESSAGES | st.text(min_size=1, max_size=30) | st.sampled_from(["#### 5", r"\boxed{", "<|MASK|>", "\ud800"])
)
ROW = st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=5) | JSON


@st.composite
def row_files(draw: Any, suffix: str) -> bytes:
    """A file of a few rows, some of which are wrong, or whose bytes are."""
    rows = draw(st.lists(ROW, max_size=4))
    if suffix == ".jsonl":
        content = b"\n".join(json.dumps(row).encode() for row in rows)
    elif suffix == ".json":
        content = json.dumps(rows).encode()
    elif suffix == ".csv":
        text = io.StringIO()
        csv.writer(text).writerows(draw(st.lists(st.lists(st.sampled_from(NAMES) | st.text(max_size=9), max_size=4))))
        content = text.getvalue().encode("utf-8", "surrogatepass")
    else:
        sink = pa.BufferOutputStream()
        kinds = st.sampled_from(
            [st.text(max_size=9), st.integers(-9, 9), st.floats(), st.binary(max_size=9), st.none()]
        )
        columns = {
            name: [draw(kind) for _ in range(3)] for name in NAMES[:8] if (kind := draw(st.none() | kinds)) is not None
        }
        pq.write_table(pa.table(columns), sink)
        content = sink.getvalue().to_pybytes()
    return draw(damaged(content)) if draw(st.booleans()) else content


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Cut, overwritten in one place, with something in between, or something else."""
    place = st.integers(0, max(0, len(content) - 1)) | st.integers(0, min(200, max(0, len(content) - 1)))
    some = st.binary(min_size=1, max_size=9)
    return (
        place.map(lambda at: content[:at])
        | st.builds(lambda at, new: content[:at] + new + content[at + len(new) :], place, some)
        | st.builds(lambda at, new: content[:at] + new + content[at:], place, some)
        | st.binary(max_size=60)
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows(suffix: str, tally: Tally, tmp_path: Path) -> None:
    tally.what = f"{suffix} file of random or damaged rows, read for RL and for SFT"
    file = tmp_path / f"rows{suffix}"

    def documents() -> None:
        source = open_documents(DataSource(path=str(file)), TOKENIZER)
        for index in range(len(source)):
            source[index]

    def check(content: bytes) -> None:
        file.write_bytes(content)
        read_or_refused(tally, lambda: load_problems(str(file)), content, file.name)
        read_or_refused(tally, documents, content, file.name)

    for_each(row_files(suffix), check, 250)


def keys_of(values: Any, prefix: str = "") -> list[str]:
    if not isinstance(values, dict):
        return [prefix[:-1]]
    return [key for name, value in values.items() for key in keys_of(value, f"{prefix}{name}.")] or [prefix[:-1]]


SCHEMAS: dict[str, Any] = {"sft": SFTConfig, "rl": RLConfig, "eval": EvalConfig}
CONFIGS = Path(__file__).parents[2] / "configs/tiny"
ODD = [
    "",
    "1",
    "-1",
    "0",
    "1.5",
    "1e400",
    "nan",
    "inf",
    "true",
    "null",
    "[]",
    "{}",
    "[",
    "{a:",
    "a: b",
    "${x}",
    "${oc.env:X}",
]
ODD += [
    "${",
    "x" * 3000,
    "\t",
    "&a *a",
    "!!python/object:os.system x",
    "[1,2]",
    "[a,[b]]",
    "{a: 1}",
    "~",
    "2**9",
    "0x10",
    "é\x00",
]


@pytest.mark.parametrize("stage", SCHEMAS)
def test_configurations(stage: str, tally: Tally, tmp_path: Path) -> None:
    tally.what = f"configuration of dirl {stage}: random overrides of random keys, random YAML"
    schema, shipped = SCHEMAS[stage], CONFIGS / f"{stage}.yaml"
    keys = keys_of(config_to_dict(load_config(schema, shipped)))
    values = st.sampled_from(ODD) | st.text(max_size=20) | JSON.map(repr) | JSON.map(json.dumps)
    override = st.builds("{}={}".format, st.sampled_from(keys) | st.text(max_size=9), values) | st.text(max_size=20)
    file = tmp_path / "random.yaml"

    def check_overrides(overrides: list[str]) -> None:
        read_or_refused(tally, lambda: load_config(schema, shipped, overrides), overrides)

    def check_file(content: bytes) -> None:
        file.write_bytes(content)
        read_or_refused(tally, lambda: load_config(schema, file), content)

    for_each(st.lists(override, min_size=1, max_size=3), check_overrides, 150)
    names = st.sampled_from([*keys, *(key.partition(".")[0] for key in keys)])
    files = st.dictionaries(names | st.text(max_size=5), JSON, max_size=4).map(lambda said: yaml.dump(said).encode())
    for_each(files | st.text().map(str.encode) | st.binary() | damaged(shipped.read_bytes()), check_file, 120)


SAMPLING = {f.name: JSON for f in fields(SamplingConfig) if f.name != "max_completion_length"}
SOME = st.fixed_dictionaries(
    {"max_completion_length": st.sampled_from([4, 8, 0, -1, 1.5, "8", None])},
    optional={**SAMPLING, "temperature": st.floats() | JSON, "confidence_threshold": st.floats(0, 1)},
).map(lambda said: said if isinstance(said["max_completion_length"], int) else {**said, "max_completion_length": 8})
IDS = st.lists(st.integers(-2, 300), max_size=6) | JSON
PROMPT = st.fixed_dictionaries({"id": JSON, "prompt_ids": IDS, "seed": st.integers() | JSON})
WEIGHTS = st.sampled_from(["its-own", "a" * 16 + ".7", ""]) | JSON
MAX_TOKENS = st.sampled_from([4, 4, 5, 0, -1, "4", 10**30])
OPENAI: dict[str, Any] = {"seed": st.integers() | JSON, "n": st.integers(-1, 3)}
OPENAI |= {
    "stop": JSON | st.text(),
    "stream": st.booleans() | JSON,
    "echo": st.booleans(),
    "logprobs": st.integers(-1, 2),
}
BODIES: dict[str, st.SearchStrategy[Any]] = {
    "/generate": st.fixed_dictionaries({"weights": WEIGHTS, "sampling": SOME, "requests": st.lists(PROMPT) | JSON}),
    "/hold": st.fixed_dictionaries({"trainer": JSON, "seconds": st.sampled_from([0, -1, "1", None, [], 10**400])}),
    "/push": st.fixed_dictionaries(
        {
            "weights": WEIGHTS,
            "pusher": JSON,
            "tensors": JSON | st.dictionaries(st.sampled_from([*kinds_of(MODEL)]), JSON),
        }
    ),
    "/broadcast": st.fixed_dictionaries({"weights": WEIGHTS, "pusher": JSON, "part": JSON}),
    "/join": st.fixed_dictionaries({"trainer": JSON, "member": JSON, "meeting": JSON}),
    "/v1/completions": st.fixed_dictionaries(
        {
            "model": st.just("tiny"),
            "max_tokens": MAX_TOKENS,
            "prompt": st.text(max_size=9) | IDS | st.lists(IDS, max_size=3),
        },
        optional=OPENAI | {"temperature": JSON, "unknown": JSON},
    ),
    "/v1/chat/completions": st.fixed_dictionaries(
        {"model": st.just("tiny"), "max_tokens": MAX_TOKENS, "messages": MESSAGES | JSON}, optional=OPENAI
    ),
}


@pytest.mark.parametrize("path", [*BODIES, "/weights"])
def test_request_bodies(path: str, tally: Tally) -> None:
    tally.what = f"request to {path} with a random body: answered or refused (4xx) in JSON, the server alive"
    with (
        serving(MODEL, TOKENIZER) as (_, url),
        httpx.Client(headers={KEY_HEADER: key_value(KEY)}, timeout=60) as client,
    ):

        def check(said: Any) -> None:
            body = said if isinstance(said, bytes) else json.dumps(said).encode()
            query = "?weights=aaaaaaaaaaaaaaaa.7&pusher=p&part=0" if path == "/weights" else ""
            answer = client.post(url + path + query, content=body)
            is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
            is_well = answer.status_code < 500 and (is_stream or isinstance(answer.json(), dict))
            if answer.status_code >= 400:
                is_well = is_well and "\n" not in answer.json()["error"]["message"]
            tally.count(is_well, f"{body[:300]!r} -> {answer.status_code} {answer.text[:200]}")

        if path == "/weights":
            whole = to_safetensors({name: t.contiguous() for name, t in named_full_parameters(MODEL)})
            client.post(f"{url}/push", content=to_json(Push("a" * 16 + ".7", "p", kinds_of(MODEL))))
            for_each(damaged(whole), check, 60)
            return
        for_each(BODIES[path] | JSON | st.binary(max_size=50), check, 150)
        done = client.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "1+1=", "max_tokens": 4})
        tally.count(done.status_code == (503 if path == "/push" and done.status_code == 503 else 200), done.text)


def test_bytes_of_models(tally: Tally, tmp_path: Path) -> None:
    tally.what = "model directory one of whose files is damaged, loaded"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    save_model(MODEL, TOKENIZER, whole)
    names = sorted(path.name for path in whole.iterdir() if path.is_file())
    change = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), damaged((whole / name).read_bytes())))

    def check(changed: tuple[str, bytes]) -> None:
        name, content = changed
        shutil.copytree(whole, broken, dirs_exist_ok=True)
        (broken / name).write_bytes(content)
        read_or_refused(tally, lambda: load(str(broken)), (name, content[:100]), "broken")

    for_each(change, check, 60)


def test_bytes_of_manifests(tally: Tally, tmp_path: Path) -> None:
    tally.what = "checkpoint with a damaged or random manifest or file: passed over for the whole one before"
    for step in (1, 2):
        folder = tmp_path / f"checkpoints/step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.bin").write_bytes(b"state" * 20)
        seal(folder, step)
    manifest, state = folder / "manifest.json", folder / "state.bin"
    contents = {file: file.read_bytes() for file in (manifest, state)}
    random_ones = JSON.map(lambda said: json.dumps({"files": said}).encode()) | JSON.map(
        lambda said: json.dumps(said).encode()
    )
    entries = st.dictionaries(st.sampled_from(["state.bin", "../x", "\0", "a" * 300]), JSON)
    random_ones |= entries.map(lambda said: json.dumps({"files": said}).encode()) | st.just(b"[" * 100_000)

    def check(changed: tuple[Path, bytes]) -> None:
        file, content = changed
        for name, whole in contents.items():
            name.write_bytes(content if name == file else whole)
        try:
            found = newest_checkpoint(tmp_path)
            is_same = content == contents[file] or (file == manifest and b'"state.bin"' not in content)
            tally.count(
                found is not None and (found.name == "step_000001" or is_same or lists_no_digest(content)), changed
            )
        except Exception as error:
            tally.count(False, f"{changed!r:.300}: {error!r:.200}")

    def lists_no_digest(content: bytes) -> bool:
        """A manifest of other spacing, or of an older version, may still describe what is there."""
        try:
            return json.loads(content)["files"]["state.bin"] in (
                [100, json.loads(contents[manifest])["files"]["state.bin"][1]],
                100,
            )
        except (ValueError, KeyError, TypeError):
            return False

    of_manifest = st.tuples(st.just(manifest), damaged(contents[manifest]) | random_ones)
    for_each(of_manifest | st.tuples(st.just(state), damaged(contents[state])), check, 400)


LATEX = [
    "\\frac",
    "\\sqrt",
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    "^",
    "_",
    "=",
    ",",
    "\\pi",
    "\\infty",
    "\\cup",
    "\\text{",
    "\\left(",
    "9",
]
LATEX += [
    "1",
    "2",
    "x",
    "y",
    "+",
    "-",
    "/",
    "!",
    "%",
    "\\%",
    ".",
    " ",
    "\\boxed{",
    "$",
    "\\begin{pmatrix}",
    "&",
    "\\\\",
    "\\int",
    "\\circ",
    "or",
]
ANSWER = st.lists(st.sampled_from(LATEX), max_size=12).map("".join) | st.text(max_size=30)


def test_random_answers(tally: Tally) -> None:
    tally.what = "random answer against a random gold, graded: a verdict"
    with MathGrader(num_workers=2, timeout_seconds=1.0) as grader:

        def check(pairs: list[tuple[str, str]]) -> None:
            start = time.monotonic()
            try:
                verdicts = grader.grade([gold for gold, _ in pairs], [rf"\boxed{{{answer}}}" for _, answer in pairs])
                is_in_time = time.monotonic() - start < 6 * len(pairs) + 60
                for pair, verdict in zip(pairs, verdicts, strict=True):
                    tally.count(isinstance(verdict, Verdict) and is_in_time, pair)
            except Exception as error:
                tally.count(False, f"{pairs!r:.300}: {error!r:.200}")

        for_each(st.lists(st.tuples(ANSWER, ANSWER), min_size=20, max_size=20), check, 20)


def test_round_trips_of_the_wire(tally: Tally) -> None:
    tally.what = "row of the wire written and read: equal"
    text, number = st.text(max_size=9), st.integers(-(2**63), 2**63 - 1)
    prompts = st.lists(st.builds(PromptRow, number, st.lists(st.integers(0, 300)), number, st.none() | st.floats(0, 1)))
    requests = st.builds(GenerateRequest, text, st.just(SamplingConfig(top_k=3)), prompts)
    logs = st.none() | st.lists(st.floats(max_value=0, allow_nan=False))
    rows = st.builds(CompletionRow, number, st.lists(number), st.lists(number), logs, logs)
    pushes = st.builds(Push, st.just("a" * 16 + ".7"), text, st.dictionaries(text, st.tuples(text, st.lists(number))))
    others = (
        rows | st.builds(Hold, text, st.floats(0, 1)) | st.builds(Join, text, number, st.dictionaries(text, number))
    )

    def check(said: Any) -> None:
        if isinstance(said, GenerateRequest):
            found: Any = GenerateRequest.from_json(said.to_json())
        elif isinstance(said, PushedPart):
            found = PushedPart.from_query(said.path().partition("?")[2])
        elif isinstance(said, str):
            found, said = (
                read_refusal(json.dumps(refusal(said, 400, code="x")).encode(), 400)[0],
                " ".join(said.split()),
            )
        else:
            found = type(said)(**json.loads(to_json(said)))
            found, said = json.dumps(asdict(found)), json.dumps(asdict(said))
        tally.count(found == said, said)

    parts = st.builds(PushedPart, text.filter(bool), text.filter(bool), st.integers(0, 10**9))
    for_each(requests | others | pushes | parts | text, check, 300)
