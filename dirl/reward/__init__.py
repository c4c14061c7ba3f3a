"""Completions -> rewards: judges text and knows no model. Importing it loads neither torch nor SymPy."""

from dirl.boxed import extract_boxed
from dirl.reward.functions import RewardError, reward_function
from dirl.reward.math_answer import MathGrader, Verdict
from dirl.reward.rubric import RewardConfig, Rubric, Scores, combine_parts

__all__ = [
    "MathGrader",
    "RewardConfig",
    "RewardError",
    "Rubric",
    "Scores",
    "Verdict",
    "combine_parts",
    "extract_boxed",
    "reward_function",
]
