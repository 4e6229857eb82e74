from pathlib import Path

import pytest
import torch

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.choice import choose, log_likelihoods
from qlora_core.modeling.load import load_full
from qlora_core.modeling.rows import PromptRow
from qlora_core.modeling.tokenizer import load_tokenizer

CHOICES = [[5, 6, 7], [8], [5, 9, 10, 11]]


def plain_log_likelihood(model: torch.nn.Module, prompt: list[int], choice: list[int]) -> float:
    """Prompt and choice read as one sequence."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + choice])).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(choice))


def test_a_choice_is_as_likely_as_when_prompt_and_choice_are_read_at_once(model_path: Path) -> None:
    model = load_full(model_path, torch.device("cpu"))
    prompt = [20, 30, 40, 50, 60]
    expected = [plain_log_likelihood(model, prompt, choice) for choice in CHOICES]
    assert log_likelihoods(model, prompt, CHOICES) == pytest.approx(expected, rel=1e-4)


def test_the_most_likely_of_the_expected_answers_is_chosen(model_path: Path) -> None:
    model, tokenizer = load_full(model_path, torch.device("cpu")), load_tokenizer(model_path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    words = ["no", "yes", "yes, but later"]
    prompts = [PromptRow(f"row-{n}", [20 + n, 30, 40], "…", word) for n, word in enumerate(words)]
    for row, prompt in zip(choose(model, tokenizer, prompts, lambda _: None), prompts, strict=True):
        plain = {
            word: plain_log_likelihood(model, prompt.prompt_ids, [*tokenizer(word)["input_ids"], end]) for word in words
        }
        assert row.chosen == max(plain, key=plain.__getitem__)
        assert (row.row_id, row.expected) == (prompt.row_id, prompt.expected)


def test_free_answers_are_no_choices(model_path: Path) -> None:
    model, tokenizer = load_full(model_path, torch.device("cpu")), load_tokenizer(model_path)
    prompts = [PromptRow(f"row-{n}", [20, 30], "…", f"answer {n}") for n in range(51)]
    with pytest.raises(EvaluationError, match="51 different answers; the metric `choice` compares 50 at most"):
        list(choose(model, tokenizer, prompts, lambda _: None))
