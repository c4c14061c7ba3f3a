"""Completions -> rewards: judges text and knows no model. Importing it loads neither torch nor SymPy."""

from dirl.reward.math_answer import MathGrader, Verdict, extract_boxed
from dirl.reward.rubric import RewardConfig, RewardError, Rubric, Scores, combine_parts, reward_function

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
