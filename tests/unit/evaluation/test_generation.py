from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qlora_core.artifacts import PreparedDataset
from qlora_core.evaluation.generation import end_of_turn_ids, generate, has_room
from qlora_core.modeling.load import load_full
from qlora_core.modeling.rows import read_prompts
from qlora_core.modeling.tokenizer import load_tokenizer
from qlora_core.recipe import Generation


@pytest.fixture(scope="module")
def model(model_path: Path) -> PreTrainedModel:
    return load_full(model_path, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(model_path)


@pytest.fixture(scope="module")
def prompts(dataset: PreparedDataset) -> list[list[int]]:
    return [prompt.prompt_ids for prompt in read_prompts(dataset.path / "prompts.arrow")]


def one_by_one(model: PreTrainedModel, prompt: list[int], most: int) -> list[int]:
    """What transformers' own greedy generation adds to one prompt when nothing stops it."""
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batched_answers_are_those_of_plain_generation(
    model: PreTrainedModel, prompts: list[list[int]], batch_size: int
) -> None:
    expected = [one_by_one(model, prompt, 24) for prompt in prompts]
    answers = generate(
        model, prompts, frozenset(), Generation(max_new_tokens=24, batch_size=batch_size), lambda _: None
    )
    assert [answer.ids for answer in answers] == expected
    assert not any(answer.stopped for answer in answers)


@pytest.mark.parametrize(
    "family",
    [
        {"model_type": "mistral", "sliding_window": 8},
        {"model_type": "qwen3", "head_dim": 8},
        {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 8},
    ],
    ids=lambda family: family["model_type"],
)
def test_models_that_look_back_in_other_ways_answer_as_in_plain_generation(
    family: dict[str, Any], prompts: list[list[int]]
) -> None:
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        **family,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    other = AutoModelForCausalLM.from_config(config).eval()
    stop = one_by_one(other, prompts[0], 20)[6]
    expected = [one_by_one(other, prompt, 20) for prompt in prompts]
    answers = generate(other, prompts, frozenset({stop}), Generation(max_new_tokens=20, batch_size=5), lambda _: None)
    assert [answer.ids for answer in answers] == [ids[: ids.index(stop)] if stop in ids else ids for ids in expected]


def test_a_row_that_ends_leaves_the_batch_and_the_others_go_on_as_before(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    free = [one_by_one(model, prompt, 24) for prompt in prompts]
    stop = free[2][5]  # a token that ends some rows early, at different places
    expected = [(ids[: ids.index(stop)], True) if stop in ids else (ids, False) for ids in free]
    answers = generate(model, prompts, frozenset({stop}), Generation(max_new_tokens=24, batch_size=5), lambda _: None)
    assert [(answer.ids, answer.stopped) for answer in answers] == expected
    assert sum(answer.stopped for answer in answers) > 0


def test_generation_ends_where_the_context_does(model: PreTrainedModel) -> None:
    limit = model.config.max_position_embeddings
    prompts = [[5] * (limit - 3), [5] * limit]
    answers = generate(model, prompts, frozenset(), Generation(max_new_tokens=50, batch_size=1), lambda _: None)
    assert [len(answer.ids) for answer in answers] == [3, 0]


def test_progress_grows_to_the_number_of_prompts(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    seen: list[int] = []
    generate(model, prompts, frozenset(), Generation(max_new_tokens=2, batch_size=2), seen.append)
    assert seen == [2, 4, 5]


def test_an_answer_ends_at_the_end_of_text_and_at_the_templates_end_of_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")}
    assert end_of_turn_ids(model, tokenizer) == ends


def test_without_a_template_only_the_end_of_text_ends_an_answer(model: PreTrainedModel, model_path: Path) -> None:
    tokenizer = load_tokenizer(model_path)
    tokenizer.chat_template = None
    assert end_of_turn_ids(model, tokenizer) == {tokenizer.eos_token_id}


def test_a_prompt_that_fills_the_context_is_left_unanswered_and_takes_no_room_from_others(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    context = model.config.max_position_embeddings
    shorter = prompts[0]
    almost = (shorter * context)[: context - 3]
    asked = [(shorter * context)[:context], almost, shorter]
    answers = generate(model, asked, frozenset(), Generation(max_new_tokens=12, batch_size=4), lambda _: None)
    assert [has_room(model, prompt) for prompt in asked] == [False, True, True]
    assert [len(answer.ids) for answer in answers] == [0, 3, 12]
    assert answers[2].ids == one_by_one(model, shorter, 12)
