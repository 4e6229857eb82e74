"""The table of scores: how people read each, and which way is better. Gates and reports ask nothing else."""

from typing import Literal, NamedTuple

from qlora_core.artifacts import Direction


class Score(NamedTuple):
    """How people read one score."""

    title: str
    unit: Literal["share", "number"] = "number"
    lower_is_better: bool | None = False
    """None: neither way is better, or nobody knows which."""


SCORES: dict[str, Score] = {
    "loss": Score("Loss", lower_is_better=True),
    "perplexity": Score("Perplexity", lower_is_better=True),
    "token_accuracy": Score("Next token right", "share"),
    "forgetting_perplexity": Score("Perplexity on other text", lower_is_better=True),
    "valid_call": Score("Valid tool calls", "share"),
    "exact_call": Score("Exact tool calls", "share"),
    "exact_match": Score("Exact answers", "share"),
    "json_valid": Score("Valid JSON", "share"),
    "schema_valid": Score("Fits the JSON schema", "share"),
    "choice_accuracy": Score("Right choice most likely", "share"),
    "rouge_1": Score("ROUGE-1", "share"),
    "rouge_2": Score("ROUGE-2", "share"),
    "rouge_l": Score("ROUGE-L", "share"),
    "bleu": Score("BLEU"),
    "stops_by_itself": Score("Answers that end by themselves", "share"),
    "answer_tokens": Score("Answer length in tokens", lower_is_better=None),
    "generation_tokens_per_s": Score("Generated tokens per second", lower_is_better=None),
    "latency_s": Score("Seconds for one answer", lower_is_better=True),
    "rounding_cost": Score("Loss added by rounding the merged weights", lower_is_better=True),
}


def describe(score: str) -> Score:
    """How people read a score; one that the table does not know is shown under its own name."""
    return SCORES.get(score) or Score(score.replace("_", " ").capitalize(), lower_is_better=None)


def direction_of(score: str) -> Direction | None:
    """Which way of a score is better, or None if the table does not say."""
    lower = describe(score).lower_is_better
    return None if lower is None else "lower" if lower else "higher"
