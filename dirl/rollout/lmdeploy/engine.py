"""Rollouts from LMDeploy's PyTorch engine, in this process, with weights that are overwritten in place.

One engine per rank (tp 1), driven by token ids. It starts from the model's configuration and tokenizer alone; its
weights are pushed from the trainer's module, bucket by bucket, into the parameters that its CUDA graphs were captured
with. LMDeploy's event loop runs in a thread of its own, and everything that touches the engine runs there.

`recorder` says what is changed in LMDeploy and why.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import logging
import tempfile
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import lmdeploy
import torch
from lmdeploy.messages import GenerationConfig, PytorchEngineConfig, ResponseType
from lmdeploy.pytorch import envs
from lmdeploy.pytorch.engine import Engine
from lmdeploy.pytorch.engine.model_agent import agent as stock_agent
from lmdeploy.utils import get_logger
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import save_tokenizer, stop_token_ids
from dirl.errors import UserError
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.logprobs import suppressed_by
from dirl.rollout.decoded import in_windows, make_completion, touched_tokens
from dirl.rollout.engine import Completion, RolloutError, SamplingConfig, SleepLevel
from dirl.rollout.lmdeploy import recorder
from dirl.rollout.lmdeploy.version import check_version
from dirl.rollout.weights import BUCKET_BYTES, ShapeCheck, buckets, checkpoint_tensors
from dirl.training.full_parameters import named_full_parameters

Result = TypeVar("Result")

_PREFILL_TOKENS = 8192  # prompt tokens read in one pass; longer prompts are read in chunks


class LMDeployEngine:
    """LMDeploy as a rollout engine."""

    def __init__(
        self,
        model: BlockDiffusionModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch_size: int = 256,
        cache_max_entry_count: float = 0.5,
        sleep_level: SleepLevel = 1,
        **engine_options: Any,  # further fields of PytorchEngineConfig
    ) -> None:
        check_version(lmdeploy.__version__)
        recorder.install()
        self.tokenizer, self.sleep_level = tokenizer, sleep_level
        self.scheme = model.scheme
        self.weights_version = 0
        self._is_stale = True
        self._asleep: set[str] = set()  # LMDeploy's tags of what is not on the device
        self._stop_ids = stop_token_ids(tokenizer)
        self._shapes = ShapeCheck({name: tuple(p.shape) for name, p in named_full_parameters(model)})
        options = {
            "dtype": "float16" if model.dtype == torch.float16 else "bfloat16",
            "max_batch_size": max_batch_size,
            "cache_max_entry_count": cache_max_entry_count,
            "max_prefill_token_num": max(_PREFILL_TOKENS, max_batch_size * self.scheme.block_length),
            "dllm_block_length": self.scheme.block_length,
            "enable_metrics": False,
        }
        self._engine = _start(model, tokenizer, PytorchEngineConfig(**{**options, **engine_options}))
        self._agent = self._engine.executor.model_agent
        self._agent.agent_strategy.suppressed_V = suppressed_by(model).to(self._device)
        self._thread = _LoopThread()
        atexit.register(self.close)  # LMDeploy's loop must not outlive the interpreter's modules
        try:
            self._thread.run(self._open())
            self._push(model)
        except BaseException:
            self.close()
            raise

    # -- the protocol

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        thresholds: Sequence[float] | None = None,
    ) -> list[Completion]:
        if thresholds is not None:
            raise UserError(
                "LMDeploy has one confidence_threshold for the whole engine, none for each completion; set "
                "rollout.engine=torch"
            )
        self._check_alive()
        if self._asleep:
            raise RolloutError("the engine is asleep; call wake before generate")
        if self._is_stale:
            raise RolloutError("the engine does not hold whole weights; call update_weights before generate")
        touched = touched_tokens(prompts, seeds, sampling, self.scheme)
        for prompt, num_tokens in zip(prompts, touched, strict=True):
            self._check_fits(len(prompt), num_tokens)
        strategy = self._agent.agent_strategy
        strategy.rules, strategy.records_holds = sampling.rules(self.scheme), sampling.record_holds
        traces = self._thread.run(self._decode(prompts, touched, seeds))
        completions = (
            make_completion(
                prompt,
                trace.token_ids,
                trace.step_map,
                trace.logprobs,
                tokenizer=self.tokenizer,
                scheme=self.scheme,
            )
            for prompt, trace in zip(prompts, traces, strict=True)
        )
        return [
            in_windows(completion, sampling, self.scheme, trace.holds if sampling.record_holds else None)
            for completion, trace in zip(completions, traces, strict=True)
        ]

    def update_weights(self, model: nn.Module) -> None:
        self._push(model)
        self.weights_version += 1

    def sleep(self) -> None:
        """Free the KV cache, and move the weights to the host (level 1) or drop them (level 2). Level 0: nothing."""
        if self.sleep_level and not self._asleep:
            self._thread.run(self._engine.sleep(self.sleep_level))
            self._asleep = {"weights", "kv_cache"}
            self._is_stale |= self.sleep_level == 2

    def wake(self) -> None:
        """Undo `sleep`; after level 2 the weights are missing until the next push."""
        self._wake({"weights", "kv_cache"})

    def close(self) -> None:
        if self._thread.is_open:
            self._thread.run(self._close())
            self._thread.close()
            atexit.unregister(self.close)

    # -- weights

    def _push(self, model: nn.Module) -> None:
        """Overwrite all weights. Sharded parameters are gathered in the calling thread, a bucket of them at a time."""
        self._is_stale = True
        self._check_alive()
        self._wake({"weights"})
        self._thread.run(self._pause())
        before = [parameter.data_ptr() for parameter in self._module.parameters()]
        named = checkpoint_tensors(self._shapes.watched(named_full_parameters(model)))
        for bucket in buckets(named, BUCKET_BYTES):
            self._thread.run(self._load(bucket))
        self._thread.run(self._finish_load(before))
        self._is_stale = False

    async def _load(self, bucket: list[tuple[str, Tensor]]) -> None:
        with self._agent.all_context():
            _wait_for_device()  # the trainer's kernels write these tensors on another stream
            self._module.load_weights(iter(bucket))
            _wait_for_device()  # and they may be freed as soon as this returns

    async def _finish_load(self, before: list[int]) -> None:
        with self._agent.all_context():
            stock_agent.process_weights_after_loading(self._module)  # ties embeddings; lays out experts
            _wait_for_device()
        if before != [parameter.data_ptr() for parameter in self._module.parameters()]:
            self._agent.reset_graph_runner()  # captured graphs read the old storage
        self._forget_prefixes()
        if not self._asleep:
            self._engine._unblock_new_inputs()
            self._engine._engine_loop.resume_from_sleep()

    async def _pause(self) -> None:
        """Bring the loop to rest between forwards, with nothing left over from earlier requests."""
        engine = self._engine
        engine._block_new_inputs()
        await engine._engine_loop.drain_for_sleep()
        engine._cancel_and_end_all_sessions()
        engine._engine_loop.reset_runtime_state()
        self._agent.reset_runtime_state()

    def _forget_prefixes(self) -> None:
        """LMDeploy keeps cached prefixes over a change of weights, and over a sleep that freed their pages."""
        self._engine.scheduler.block_trie.evict(1 << 30)

    def _wake(self, tags: set[str]) -> None:
        missing = sorted(tags & self._asleep, reverse=True)  # weights before kv_cache
        if missing:
            self._thread.run(self._wake_up(missing))
            self._asleep -= tags

    async def _wake_up(self, tags: list[str]) -> None:
        self._engine.wakeup(tags)
        self._forget_prefixes()
        if "weights" in tags:
            with self._agent.all_context():
                stock_agent.process_weights_after_loading(self._module)  # moving a module unties its embeddings

    # -- decoding

    async def _decode(
        self, prompts: Sequence[Sequence[int]], touched: Sequence[int], seeds: Sequence[int]
    ) -> list[recorder.Trace]:
        tasks = [
            asyncio.create_task(self._decode_one(i, list(prompt), num_tokens, seed))
            for i, (prompt, num_tokens, seed) in enumerate(zip(prompts, touched, seeds, strict=True))
        ]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _decode_one(self, session_id: int, prompt: list[int], num_tokens: int, seed: int) -> recorder.Trace:
        # Temperature 1 and top-k 1 hand the logits on unchanged; the recorder draws.
        request = GenerationConfig(
            max_new_tokens=num_tokens,
            temperature=1.0,
            top_k=1,
            random_seed=seed,
            stop_token_ids=list(self._stop_ids),
        )
        status = "nothing"
        async for answer in self._engine.create_instance().async_stream_infer(session_id, prompt, request):
            status = answer.status.name
            if answer.status == ResponseType.FINISH and answer.routed_experts is not None:
                return answer.routed_experts
        raise RolloutError(f"LMDeploy answered prompt {session_id} ({len(prompt)} tokens) with {status}")

    def _check_fits(self, prompt_length: int, num_tokens: int) -> None:
        """LMDeploy would shorten the completion, with a line in its log."""
        if prompt_length == 0:
            raise UserError("LMDeploy decodes no empty prompt; begin it with a token")
        most = self._engine.max_session_len
        if prompt_length + num_tokens > most:
            raise UserError(
                f"a prompt of {prompt_length} tokens and a completion of {num_tokens} do not fit the KV cache, which "
                f"holds {most}; lower max_completion_length, or raise cache_max_entry_count"
            )

    # -- LMDeploy's parts

    @property
    def _module(self) -> Any:
        return self._agent.patched_model.get_model()

    @property
    def _device(self) -> torch.device:
        return next(self._module.parameters()).device

    async def _open(self) -> None:
        self._engine.start_loop()
        while self._engine._engine_loop is None:
            await asyncio.sleep(0.01)

    async def _close(self) -> None:
        loop_task = self._engine._loop_main
        self._engine.close()
        if loop_task is not None:
            await asyncio.wait([loop_task], timeout=30)  # it frees the model and the cache on its way out
        self._engine.req_manager.stop_loop()

    def _check_alive(self) -> None:
        if not self._thread.is_open or self._engine._engine_loop is None:
            raise RolloutError(
                "LMDeploy's loop has ended (its log says why), or the engine was closed; build a new one"
            )


class _LoopThread:
    """An event loop in a thread, and a call that runs a coroutine there."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, args=(_current_device(),), daemon=True)
        self._thread.start()
        self.is_open = True

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The coroutine's result, or its exception."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        self.is_open = False
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # a new thread starts on device 0
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


def _start(model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, config: PytorchEngineConfig) -> Engine:
    """An engine with the model's configuration and weights that are still to be pushed."""
    get_logger("lmdeploy").setLevel(logging.WARNING)
    envs.enable_check_env = False  # it spawns processes, which import the caller's script again
    model_config = copy.deepcopy(model.config)
    model_config.architectures = [type(model).__name__]
    load_from_disk = stock_agent.load_model_weights
    stock_agent.load_model_weights = _skip_loading
    try:
        with tempfile.TemporaryDirectory() as directory:
            model_config.save_pretrained(directory)
            save_tokenizer(tokenizer, directory)
            return Engine(directory, config)
    finally:
        stock_agent.load_model_weights = load_from_disk


def _skip_loading(model: nn.Module, *_: Any, **__: Any) -> None:
    """LMDeploy's own empty start demands Ray."""
    model.eval()
    stock_agent.process_weights_after_loading(model)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _current_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None
