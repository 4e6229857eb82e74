"""Which of a few answers a model finds most likely: accuracy for classification without generating anything."""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.generation import end_of_turn_ids, template_end_id
from qlora_core.evaluation.scored import RowChoice
from qlora_core.modeling.rows import PromptRow

MOST_CHOICES = 50


def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[PromptRow],
    progress: Callable[[int], None],
) -> Iterator[RowChoice]:
    """For each prompt, the most likely of all answers that the evaluation rows expect.

    An answer counts with the token that ends the turn, so that `yes` does not win by being how `yes, but` begins.

    Raises:
        EvaluationError: the rows expect too many different answers to call them choices.
    """
    choices = sorted({prompt.expected for prompt in prompts})
    if len(choices) > MOST_CHOICES:
        raise EvaluationError(
            f"the evaluation rows expect {len(choices)} different answers; the metric `choice` compares "
            f"{MOST_CHOICES} at most, take `exact_match` for free answers"
        )
    end = template_end_id(tokenizer) or min(end_of_turn_ids(model, tokenizer))
    ids = [[*tokenizer(choice, add_special_tokens=False)["input_ids"], end] for choice in choices]
    for done, prompt in enumerate(prompts, start=1):
        likelihoods = log_likelihoods(model, prompt.prompt_ids, ids)
        chosen = choices[max(range(len(choices)), key=likelihoods.__getitem__)]
        yield RowChoice(row_id=prompt.row_id, expected=prompt.expected, chosen=chosen)
        progress(done)


@torch.inference_mode()
def log_likelihoods(model: PreTrainedModel, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> list[float]:
    """Log-likelihood in nats of each continuation of one prompt; the prompt is read once."""
    cache = DynamicCache(config=model.config)
    read = torch.tensor([prompt], device=model.device)
    first = model(input_ids=read, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    cache.batch_repeat_interleave(len(choices))

    longest = max(map(len, choices))
    ids = torch.tensor([[*choice, *[0] * (longest - len(choice))] for choice in choices], device=model.device)
    lengths = torch.tensor([[len(choice)] for choice in choices], device=model.device)
    mask = torch.arange(longest, device=model.device) < lengths
    seen = torch.ones(len(choices), len(prompt), dtype=torch.long, device=model.device)
    logits = model(
        input_ids=ids,
        attention_mask=torch.cat([seen, mask.long()], dim=1),
        position_ids=torch.arange(len(prompt), len(prompt) + longest, device=model.device).expand_as(ids),
        past_key_values=cache,
        use_cache=True,
    ).logits
    predicting = torch.cat([first.expand(len(choices), -1, -1), logits[:, :-1]], dim=1)
    per_token = predicting.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    sums: list[float] = (per_token * mask).sum(1).tolist()
    return sums
