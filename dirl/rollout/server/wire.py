"""What a trainer and `dirl serve` say to each other: the names and fields of both ends, and the server's settings.

    GET  /health                                  -> Health
    POST /generate                 GenerateRequest -> CompletionRows
    POST /weights?WeightsPart      safetensors     -> {weights_version}; in order; the last part changes over

Requests and answers are JSON. Every call carries the key; a refusal has the form of OpenAI's, and status 409 means: not
yet. What other clients say is in `api_request` and `api_answer`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from urllib.parse import parse_qs, urlencode

from dirl.config import PATH, Config, bounded
from dirl.model.checkpoint import ModelConfig
from dirl.rollout.engine import ApproximateCache, EngineConfig, SamplingConfig

KEY_VARIABLE = "DIRL_SERVER_KEY"
PARENT_VARIABLE = "DIRL_SERVER_HAS_PARENT"  # set: standard input is a pipe that closes when the parent dies
HEALTH, GENERATE, WEIGHTS = "/health", "/generate", "/weights"
KEY_HEADER = "Authorization"


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Config):
    """What `dirl serve` decodes with, and where it listens."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # of /v1 requests, where they do not say
    bf16: bool = False  # decode under autocast to bfloat16: as a trainer with `bf16: true` scores
    host: str = "127.0.0.1"
    port: int = bounded(8100, least=0, most=65535)  # 0: any free one
    empty: bool = False  # start from config.json alone; a trainer pushes the weights
    ready_file: str = field(default="", metadata=PATH)  # written with the address once the server listens

    def check(self) -> None:
        if self.engine.mode != "colocate":
            raise ValueError("engine.mode must be colocate in a server: it is the one that decodes")


@dataclass(frozen=True)
class Health:
    """What is served."""

    weights_version: int | None  # None: in the middle of a push, or never any
    block_length: int  # 0: full attention
    shift: int
    mask_token_id: int
    vocab_size: int
    bf16: bool | None  # decodes under autocast to bfloat16; None: in a precision of the engine's own
    approximate_cache: ApproximateCache


@dataclass(frozen=True)
class PromptRow:
    """One prompt of a request; its completion bears the same id."""

    id: int
    prompt_ids: list[int]
    seed: int
    threshold: float | None = None  # in the place of the sampling's; all rows of a request have one, or none has


@dataclass(frozen=True)
class CompletionRow:
    """One completion of an answer: what the fields of `Completion` that are not here follow from."""

    id: int
    token_ids: list[int]
    step_map: list[int]
    logprobs: list[float] | None
    hold_logprobs: list[float] | None


@dataclass(frozen=True)
class GenerateRequest:
    """Prompts, how to decode them, and the version of the weights to decode them with."""

    weights_version: int
    sampling: SamplingConfig
    requests: list[PromptRow]

    def to_json(self) -> bytes:
        # The fields of SamplingConfig alone, whatever larger configuration holds them.
        sampling = {f.name: getattr(self.sampling, f.name) for f in fields(SamplingConfig)}
        rows = [asdict(row) for row in self.requests]
        return json.dumps({"weights_version": self.weights_version, "sampling": sampling, "requests": rows}).encode()

    @classmethod
    def from_json(cls, body: bytes) -> GenerateRequest:
        """
        Raises:
            ValueError, KeyError, TypeError: a field is missing, unknown or wrong.
        """
        sent = json.loads(body)
        rows = [PromptRow(**row) for row in sent["requests"]]
        return cls(sent["weights_version"], SamplingConfig(**sent["sampling"]), rows)


@dataclass(frozen=True)
class WeightsPart:
    """Which part of which push a bucket of weights is."""

    version: int
    part: int  # from 0
    is_last: bool

    def path(self) -> str:
        return f"{WEIGHTS}?{urlencode({'version': self.version, 'part': self.part, 'last': int(self.is_last)})}"

    @classmethod
    def from_query(cls, query: str) -> WeightsPart:
        """
        Raises:
            ValueError, KeyError: a field is missing or no number.
        """
        version, part, last = (int(parse_qs(query)[name][0]) for name in ("version", "part", "last"))
        return cls(version, part, bool(last))


def key_value(key: str) -> str:
    """What KEY_HEADER says."""
    return f"Bearer {key}"


def completions_answer(rows: Sequence[CompletionRow]) -> dict[str, Any]:
    return {"completions": [asdict(row) for row in rows]}


def read_completions(answer: Mapping[str, Any]) -> list[CompletionRow]:
    return [CompletionRow(**row) for row in answer["completions"]]


def refusal(reason: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """
    Args:
        param: the field of the request that is wrong.
        code: a word for programs.
    """
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": reason, "type": kind, "param": param, "code": code}}


def read_refusal(body: bytes, status: int) -> str:
    """Why; the status where the answer does not say."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"
