"""An engine without a model: a script says what each prompt is answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import decode
from dirl.rollout.engine import Completion, SamplingConfig

Script = Callable[[str, int, SamplingConfig], str]


class ScriptedEngine:
    """Answers `script(prompt text, seed, sampling)`; dynamic decoding reveals two tokens a step, static one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, script: Script, *, dies_after: int | None = None) -> None:
        self.tokenizer, self.script, self.dies_after = tokenizer, script, dies_after
        self.weights_version = 0
        self.num_generated = 0
        self.is_closed = False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        thresholds: Sequence[float] | None = None,
    ) -> list[Completion]:
        completions = []
        for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            if self.num_generated == self.dies_after:
                raise KeyboardInterrupt
            self.num_generated += 1
            own = replace(sampling, confidence_threshold=thresholds[place]) if thresholds else sampling
            threshold = thresholds[place] if thresholds else None
            completions.append(replace(self._complete(list(prompt), seed, own), confidence_threshold=threshold))
        return completions

    def _complete(self, prompt: list[int], seed: int, sampling: SamplingConfig) -> Completion:
        text = self.script(decode(self.tokenizer, prompt), seed, sampling)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        is_truncated = len(ids) >= sampling.max_completion_length
        ids = ids[: sampling.max_completion_length] if is_truncated else [*ids, self.tokenizer.eos_token_id]
        per_step = 2 if sampling.unmasking_strategy == "low_confidence_dynamic" else 1
        return Completion(
            prompt_ids=prompt,
            token_ids=ids,
            step_map=[1 + i // per_step for i in range(len(ids))],
            logprobs=None,
            completion_length=len(ids),
            finish_reason="length" if is_truncated else "stop",
            num_denoising_steps=-(-len(ids) // per_step),
            text=decode(self.tokenizer, ids),
        )

    def update_weights(self, model: nn.Module) -> None:
        self.weights_version += 1

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True
