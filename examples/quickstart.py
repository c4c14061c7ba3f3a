# %% [markdown]
# # dirl in ten minutes
#
# Load a block-diffusion language model, watch it decode, score what it wrote, give it a reward of your own, and train
# it for a few steps: first with random masking (SFT), then with DiPO (RL). Everything runs on a CPU. The model here is
# tiny and untrained; put the path of a trained one (`outputs/tiny/rl/final` after `bash examples/quickstart.sh`, or an
# SDAR checkpoint) into `MODEL` to see sense.

# %%
import dirl

MODEL = ""  # a Hugging Face directory; empty: a tiny model with random weights
OUTPUT = "outputs/notebook"
model, tokenizer = dirl.load(MODEL) if MODEL else dirl.tiny()

# %% [markdown]
# ## Generate, and look at the trajectory
#
# A completion holds token ids and, for each, the denoising step of its block at which it was revealed. Colours run from
# the first step of a block (blue) to its last (orange); boxes are blocks; point at a token for its confidence.

# %%
completions = dirl.generate(model, tokenizer, ["9+7+8=", "1+2="], max_completion_length=24, confidence_threshold=0.5)
completions

# %%
completions[0].show()  # a slider over the denoising steps

# %%
dirl.plot_trajectory(completions[0])

# %%
completions.to_pandas()[["text", "completion_length", "num_denoising_steps", "tokens_per_step"]]

# %% [markdown]
# ## Log-probabilities
#
# What the model gave each token at the step it was revealed, from one packed forward pass, with gradient. They are the
# engine's own numbers again.

# %%
logprobs = dirl.logprobs(model, completions, dirl.SamplingConfig(confidence_threshold=0.5))
engine_logprobs = completions[0].logprobs
max(abs(float(a) - b) for a, b in zip(logprobs[0], engine_logprobs, strict=True))

# %% [markdown]
# ## Five steps of SFT

# %%
sft = dirl.SFTTrainer(
    dirl.SFTConfig(
        output_dir=f"{OUTPUT}/sft",
        max_steps=5,
        global_batch_size=8,
        learning_rate=3e-3,
        data=dirl.SFTDataConfig(path="task:noisy_sums", limit=200),
    ),
    model=model,
    tokenizer=tokenizer,
)
for _ in range(5):
    metrics = sft.step()
    print(f"loss {metrics['loss']:.3f}  gradient norm {metrics['grad_norm']:.2f}")

# %% [markdown]
# ## A reward of your own
#
# A reward is a function of texts (and of token ids, step maps and the data set's columns) that returns a number per
# completion, or `None` where it does not apply. This one likes digits, which even an untrained model can learn.


# %%
@dirl.rewards.reward_function("digits")
def digits(prompts, completions, *, completion_ids, step_maps, **columns):
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in completions]


# %% [markdown]
# ## Five steps of RL
#
# `step()` rolls out a group per prompt, scores it, and takes one DiPO step. `train()` would run to the end, with
# checkpoints and a report; what was rolled out last is in `trainer.last`.

# %%
config = dirl.RLConfig(
    output_dir=f"{OUTPUT}/rl",
    max_steps=5,
    learning_rate=3e-4,
    data=dirl.RLDataConfig(path="task:noisy_sums", limit=200),
    completions_steps=1,
    save_steps=0,
    rollout=dirl.RolloutConfig(prompts_per_step=4, num_generations=4, max_completion_length=16),
    reward=dirl.RewardConfig(functions=["digits"]),
    resume_from_checkpoint="none",
)
trainer = dirl.RLTrainer(config, model=model, tokenizer=tokenizer)
final = trainer.train()

# %%
best = max(trainer.last.groups, key=lambda group: max(group.rewards))
dirl.with_texts(best.completions, tokenizer, model.scheme)

# %% [markdown]
# ## Pictures
#
# `train()` also wrote `report.html`, one page to open in a browser, and pictures of the curves.

# %%
dirl.plot_run(f"{OUTPUT}/rl")
