"""OpenAI's endpoints over a server's rollouts: /v1/models, /v1/completions and /v1/chat/completions.

A choice is one row in the line of `rollouts`; a stream sends what is certain after each finished block.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from dirl.errors import one_line
from dirl.rollout.engine import Completion, SamplingConfig
from dirl.rollout.server.api_answer import END_OF_STREAM, Answer, Choice, Cutter, event
from dirl.rollout.server.api_request import ApiRequest, read_chat, read_completion
from dirl.rollout.server.hosted import SEEDS, RolloutServer
from dirl.rollout.server.walls import Refused, read_body, read_json, unless_gone
from dirl.rollout.server.wire import PromptRow, refusal

logger = logging.getLogger(__name__)

_BODY_BYTES = 32 << 20


class Api:
    """The endpoints.

    Args:
        name: of the model, as clients must say it.
        sampling: what holds where a request says nothing.
    """

    def __init__(
        self, rollouts: RolloutServer, tokenizer: PreTrainedTokenizerBase, name: str, sampling: SamplingConfig
    ) -> None:
        self.rollouts, self._tokenizer, self._name, self._sampling = rollouts, tokenizer, name, sampling
        self._created = int(time.time())
        self._reading = threading.Lock()  # tokenizers change themselves while they encode

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._models),
            Route("/v1/completions", partial(self._complete, False), methods=["POST"]),
            Route("/v1/chat/completions", partial(self._complete, True), methods=["POST"]),
        ]

    async def _models(self, request: Request) -> Response:
        model = {"id": self._name, "object": "model", "created": self._created, "owned_by": "dirl"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        self._check_model(request.path_params["name"])
        return JSONResponse(model)

    async def _complete(self, is_chat: bool, request: Request) -> Response:
        body = read_json(await read_body(request, _BODY_BYTES))
        self._check_model(body.get("model"))
        if self.rollouts.receiver.weights is None:
            raise Refused("no weights were pushed yet; try again", HTTPStatus.SERVICE_UNAVAILABLE)
        asked = await run_in_threadpool(self._read, body, is_chat)
        answer, cutter = Answer(self._name, is_chat), Cutter(self._tokenizer, asked)
        if asked.is_streamed:
            stream = _Stream(cutter)
            futures = await run_in_threadpool(self._ask, asked, stream.watch)
            return StreamingResponse(stream.events(asked, answer, futures), media_type="text/event-stream")

        def is_enough(_: int, token_ids: list[int]) -> bool:
            return cutter.so_far(token_ids)[1] is not None

        futures = await run_in_threadpool(self._ask, asked, is_enough if asked.stops else None)
        completions = await unless_gone(request, futures)
        choices = await run_in_threadpool(lambda: [cutter.choice(completion) for completion in completions])
        return JSONResponse(answer.whole(choices, asked))

    def _check_model(self, name: Any) -> None:
        if name != self._name:
            raise Refused(
                f"the model {name!r} is not here; {self._name!r} is",
                HTTPStatus.NOT_FOUND,
                param="model",
                code="model_not_found",
            )

    def _read(self, body: Mapping[str, Any], is_chat: bool) -> ApiRequest:
        with self._reading:
            asked = (read_chat if is_chat else read_completion)(body, self._tokenizer, self._sampling)
        most = getattr(self.rollouts.model.config, "max_position_embeddings", None)
        longest = max(map(len, asked.prompts)) + asked.max_tokens
        if most is not None and longest > most:
            reason = f"the model reads {most} tokens, prompt and completion have up to {longest}; shorten one of them"
            raise Refused(reason, param="messages" if is_chat else "prompt", code="context_length_exceeded")
        return asked

    def _ask(self, asked: ApiRequest, watch: Callable[[int, list[int]], bool] | None) -> list[Future[Completion]]:
        """One row a choice; the choices of a prompt have seeds that follow each other."""
        # Each its own threshold: those of different ones share a batch.
        is_dynamic = asked.sampling.unmasking_strategy == "low_confidence_dynamic"
        threshold = asked.sampling.confidence_threshold if is_dynamic and self.rollouts.is_open else None
        rows: list[PromptRow] = []
        for prompt in asked.prompts:
            first = secrets.randbelow(SEEDS - asked.num_choices) if asked.seed is None else asked.seed
            rows += [
                PromptRow(len(rows) + number, prompt, first + number, threshold) for number in range(asked.num_choices)
            ]
        # The block that max_tokens end in is decoded whole, and cut afterwards.
        rest = max(self.rollouts.model.scheme.block_length - 1, 0)
        sampling = replace(asked.sampling, max_completion_length=asked.max_tokens + rest)
        return self.rollouts.ask(rows, sampling, watch=watch)


class _Stream:
    """Texts and completions on their way from the engine's thread to one client, who may read slowly."""

    def __init__(self, cutter: Cutter) -> None:
        self._cutter, self._loop = cutter, asyncio.get_running_loop()
        self._told = asyncio.Queue[tuple[int, str | Future[Completion]]]()
        self._num_told: dict[int, int] = defaultdict(int)  # characters of each choice

    def watch(self, index: int, token_ids: list[int]) -> bool:
        text, reason = self._cutter.so_far(token_ids)
        self._tell(index, text[self._num_told[index] :])
        self._num_told[index] = len(text)
        return reason is not None

    async def events(
        self, asked: ApiRequest, answer: Answer, futures: Sequence[Future[Completion]]
    ) -> AsyncIterator[bytes]:
        choices: dict[int, Choice] = {}
        try:
            for index, future in enumerate(futures):
                future.add_done_callback(partial(self._tell, index))
            for first in answer.first_events(asked):
                yield first
            while len(choices) < len(futures):
                index, what = await self._told.get()
                if not isinstance(what, str):
                    choices[index] = self._cutter.choice(what.result())
                    what = choices[index].text[self._num_told[index] :]
                if what:
                    yield answer.text_event(index, what)
                if index in choices:
                    yield answer.last_event(index, choices[index], asked)
            if asked.has_usage:
                yield answer.usage_event(list(choices.values()), asked)
            yield END_OF_STREAM
        except Exception as error:  # the status is sent already: the stream says what happened
            logger.exception("a stream failed")
            yield event(refusal(one_line(error), HTTPStatus.INTERNAL_SERVER_ERROR))
        finally:
            for future in futures:  # of a client that has gone
                future.cancel()

    def _tell(self, index: int, what: str | Future[Completion]) -> None:
        self._loop.call_soon_threadsafe(self._told.put_nowait, (index, what))
