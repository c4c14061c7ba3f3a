"""What a trainer and `dirl serve` say to each other: the names and fields of both ends, and the server's settings.

    GET  /health                              -> Health
    POST /generate           GenerateRequest  -> {completions: CompletionRows}
    POST /hold               Hold             -> {}        this trainer's weights, no other's, for so long
    POST /push               Push             -> {weights} what will come; refused whole, or begun, or here already
    POST /weights?PushedPart safetensors      -> {weights} in order; once all that was announced is there, they are used
    POST /join               Join             -> {}        be a member of a group that weights are broadcast in
    POST /broadcast          PushedPart       -> {weights} all that was announced comes through the group, in its order

Weights have names: the trainer's, a point, and a number (`Push.weights`). Requests and answers are JSON. Every call
carries the key; a refusal has the form of OpenAI's, and one with status 409 a code: NOT_YET, TAKEN, LOST or NO_GROUP.
What other clients say is in `api_request` and `api_answer`.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from urllib.parse import parse_qsl, urlencode

from dirl.config import PATH, Config, bounded
from dirl.diffusion.packing import BlockOrigin
from dirl.model.checkpoint import ModelConfig
from dirl.rollout.engine import ApproximateCache, EngineConfig, SamplingConfig

KEY_VARIABLE = "DIRL_SERVER_KEY"
# Set: standard input is a pipe that closes when the parent dies, and this the folder of its that goes then.
PARENT_VARIABLE = "DIRL_SERVER_PARENT_FOLDER"
HEALTH, GENERATE, HOLD, PUSH, WEIGHTS = "/health", "/generate", "/hold", "/push", "/weights"
JOIN, BROADCAST = "/join", "/broadcast"
KEY_HEADER = "Authorization"
# Why not (status 409): they will come; another trainer has it; it has nothing of this trainer; it is in no group.
NOT_YET, TAKEN, LOST, NO_GROUP = "not_yet", "other_trainer", "lost_weights", "no_group"
LEASE_SECONDS = 60.0  # a trainer that is not heard from for so long has gone


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

    weights: str | None  # their name; None: in the middle of a push, or never any
    block_length: int  # 0: full attention
    block_origin: BlockOrigin
    shift: int
    mask_token_id: int
    vocab_size: int
    bf16: bool | None  # decodes under autocast to bfloat16; None: in a precision of the engine's own
    approximate_cache: ApproximateCache
    hardware: str  # that pushed weights are written to: cpu, or the identity of a GPU


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

    def check(self, num_tokens: int, vocab_size: int, num_steps: int) -> None:
        """
        Args:
            num_tokens: that it may have at most.
            num_steps: of a block, at most.
        Raises:
            ValueError: no engine decodes that.
        """
        ranges = {"id": (0, None), "token_ids": (0, vocab_size - 1), "step_map": (1, num_steps)}
        for name, values in {"id": [self.id], "token_ids": self.token_ids, "step_map": self.step_map}.items():
            least, most = ranges[name]
            if not all(type(value) is int and least <= value and (most is None or value <= most) for value in values):
                raise ValueError(f"{name} must be whole numbers from {least} to {most}, got {values!r:.60}")
        for name, logs in {"logprobs": self.logprobs, "hold_logprobs": self.hold_logprobs}.items():
            # NaN stays, which says that the model's logits are not finite.
            is_list = logs is None or isinstance(logs, list)
            if not is_list or not all(type(log) in (int, float) and not log > 1e-3 for log in logs or ()):
                raise ValueError(f"{name} must be numbers of at most 0, got {logs!r:.60}")
        lengths = {len(values) for values in (self.token_ids, self.step_map, self.logprobs) if values is not None}
        if len(lengths) != 1 or not 0 < max(lengths) <= num_tokens:
            raise ValueError(f"tokens, steps and logprobs must be equally many, 1 to {num_tokens}, got {lengths}")


@dataclass(frozen=True)
class GenerateRequest:
    """Prompts, how to decode them, and the weights to decode them with."""

    weights: str
    sampling: SamplingConfig
    requests: list[PromptRow]

    def to_json(self) -> bytes:
        # The fields of SamplingConfig alone, whatever larger configuration holds them.
        sampling = {f.name: getattr(self.sampling, f.name) for f in fields(SamplingConfig)}
        return to_json({**asdict(self), "sampling": sampling})

    @classmethod
    def from_json(cls, body: bytes) -> GenerateRequest:
        """
        Raises:
            ValueError, KeyError, TypeError: a field is missing, unknown or wrong.
        """
        sent = json.loads(body)
        rows = [PromptRow(**row) for row in sent["requests"]]
        return cls(sent["weights"], SamplingConfig(**sent["sampling"]), rows)


@dataclass(frozen=True)
class Hold:
    """A trainer wants a server, or wants it still."""

    trainer: str
    seconds: float  # 0: no longer


@dataclass(frozen=True)
class Push:
    """What a trainer is about to send."""

    weights: str
    pusher: str  # one of the trainer's processes; it alone may begin anew before it has finished
    tensors: dict[str, tuple[str, list[int]]]  # name -> dtype, shape

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{16}\.[0-9]{1,12}", self.weights):
            raise ValueError(f"weights must be named TRAINER.NUMBER, got {self.weights[:40]!r}")
        if not isinstance(self.tensors, dict):
            raise ValueError(f"tensors must be names with a dtype and a shape each, got {self.tensors!r:.60}")


@dataclass(frozen=True)
class Join:
    """Where a group meets (`Meeting`), and as whom to come."""

    trainer: str
    member: int
    meeting: dict[str, Any]


@dataclass(frozen=True)
class PushedPart:
    """Which part of which push a bucket of weights is."""

    weights: str
    pusher: str
    part: int = 0

    def path(self) -> str:
        return f"{WEIGHTS}?{urlencode(asdict(self))}"

    @classmethod
    def from_query(cls, query: str) -> PushedPart:
        """
        Raises:
            ValueError, TypeError, KeyError: a field is missing, unknown or no number.
        """
        sent = dict(parse_qsl(query))
        return cls(**{**sent, "part": int(sent["part"])})  # type: ignore[arg-type]


def trainer_of(weights: str) -> str:
    return weights.partition(".")[0]


def to_json(said: Any) -> bytes:
    """A row of this file, or what JSON knows, as a body."""
    return json.dumps(said if isinstance(said, dict) else asdict(said)).encode()


def key_value(key: str) -> str:
    """What KEY_HEADER says."""
    return f"Bearer {key}"


def refusal(reason: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """
    Args:
        param: the field of the request that is wrong.
        code: a word for programs.
    """
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": reason, "type": kind, "param": param, "code": code}}


def read_object(said: bytes) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is no JSON object.
    """
    try:
        read = json.loads(said)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deep") from error
    if not isinstance(read, dict):
        raise ValueError(f"{read!r:.60} is no JSON object")
    return read


def read_refusal(body: bytes, status: int) -> tuple[str, str | None]:
    """Why, on one line, and in a word for programs; the status where the answer does not say."""
    try:
        error = read_object(body)["error"]
        return " ".join(str(error["message"]).split())[:500], error["code"] and str(error["code"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}", None
