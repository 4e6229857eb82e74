"""Greedy answers to many prompts at once.

Prompts of similar length share a batch, padded on the left; the keys and values of what was read are kept, and a row
that ends its turn leaves the batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from qlora_core.modeling.context import context_tokens
from qlora_core.recipe import Generation

_MARK = "mark-of-the-answer"


class Answer(NamedTuple):
    """What a model said, without the token that ends its turn."""

    ids: list[int]
    stopped: bool
    """Whether the model ended its turn by itself, before the cap."""


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    generation: Generation,
    progress: Callable[[int], None],
) -> list[Answer]:
    """Greedy continuation of each prompt (token ids), in the order given.

    A row ends at a token of `stop_ids`, after `generation.max_new_tokens`, or where the model's context ends; one whose
    prompt fills that already gets an empty answer.
    """
    fitting = [index for index, prompt in enumerate(prompts) if has_room(model, prompt)]
    order = sorted(fitting, key=lambda index: len(prompts[index]), reverse=True)
    answers = dict.fromkeys(range(len(prompts)), Answer([], stopped=False))
    for start in range(0, len(order), generation.batch_size):
        members = order[start : start + generation.batch_size]

        def ended(rows: int, before: int = start) -> None:
            progress(before + rows)

        batch = _generate_batch(model, [prompts[i] for i in members], stop_ids, generation.max_new_tokens, ended)
        answers.update(zip(members, batch, strict=True))
        progress(start + len(members))
    return [answers[index] for index in range(len(prompts))]


def has_room(model: PreTrainedModel, prompt: Sequence[int]) -> bool:
    """Whether the model's context holds the prompt and at least one token more."""
    context = context_tokens(model.config)
    return context is None or len(prompt) < context


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Token ids that end an answer: the end of text of model and tokenizer, and what the chat template writes."""
    configured = model.generation_config.eos_token_id
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    ids |= {tokenizer.eos_token_id, template_end_id(tokenizer)}
    return frozenset(token for token in ids if token is not None)


def template_end_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The special token that the chat template puts right after an assistant's words, if there is one."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_MARK)[2].lstrip()
    ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


@torch.inference_mode()
def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    ended: Callable[[int], None],
) -> list[Answer]:
    ids, attention = _pad_left(prompts, model.device)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    alive, said, stopped = list(range(len(prompts))), [list[int]() for _ in prompts], set[int]()
    context = context_tokens(model.config)
    room = [max_new_tokens if context is None else min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    for _ in range(max(room)):
        output = model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = output.logits[:, -1].argmax(-1)
        going_on = []
        for at, (row, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
            if token in stop_ids:
                stopped.add(row)
            else:
                said[row].append(token)
                if len(said[row]) < room[row]:  # its own: padding takes none of a row's context
                    going_on.append(at)
        if not going_on:
            break
        if len(going_on) < len(alive):
            keep = torch.tensor(going_on, device=model.device)
            cache.batch_select_indices(keep)
            chosen, attention, positions = chosen[keep], attention[keep], positions[keep]
            alive = [alive[at] for at in going_on]
            ended(len(prompts) - len(alive))
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        attention = torch.nn.functional.pad(attention, (0, 1), value=1)
    return [Answer(tokens, row in stopped) for row, tokens in enumerate(said)]


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both `[rows, longest]`; padding is masked, so its id does not matter."""
    longest = max(map(len, prompts))
    ids, attention = torch.zeros((2, len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention[row, longest - len(prompt) :] = 1
    return ids.to(device), attention.to(device)
