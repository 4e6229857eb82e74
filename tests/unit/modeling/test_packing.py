import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_core.modeling.loss import collate, collate_packed, token_loss
from qlora_core.modeling.packing import best_fit_decreasing, efficiency
from qlora_core.modeling.rows import TokenRow


def test_the_longest_row_goes_first_and_each_into_the_fullest_bin_with_room():
    assert best_fit_decreasing([3, 6, 4, 7, 5], 10) == [[3, 0], [1, 2], [4]]


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_row_is_packed_once_and_no_bin_overflows(lengths: list[int]):
    bins = best_fit_decreasing(lengths, 64)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 64 for rows in bins)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_it_equals_the_search_through_all_bins(lengths: list[int]):
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [at for at, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda at: rooms[at])] -= length
        else:
            rooms.append(64 - length)
    bins = best_fit_decreasing(lengths, 64)
    assert sorted(64 - sum(lengths[row] for row in rows) for rows in bins) == sorted(rooms)


def test_a_row_longer_than_a_bin_is_refused():
    with pytest.raises(ValueError, match="a row has 11 tokens; a bin holds 10"):
        best_fit_decreasing([11], 10)


def test_efficiency_is_tokens_over_slots():
    assert efficiency([5, 5, 5], 10) == 0.75
    assert efficiency([], 10) == 0


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_efficiency_counts_the_bins_of_the_packing(lengths: list[int]):
    bins = best_fit_decreasing(lengths, 64)
    assert efficiency(lengths, 64) == sum(lengths) / (len(bins) * 64)


def test_long_texts_pack_to_more_than_98_percent():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 5000).clip(8, 2048).astype(int)
    assert efficiency(lengths.tolist(), 2048) > 0.98


LENGTHS = [17, 30, 5, 22, 9, 31, 13, 2]
CAPACITY = 40


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).float()


def random_rows() -> list[TokenRow]:
    random = np.random.default_rng(3)
    return [
        TokenRow(
            str(at),
            random.integers(1, 64, length).astype(np.int32),
            np.concatenate([[0], random.integers(0, 2, length - 1)]).astype(np.uint8),
        )
        for at, length in enumerate(LENGTHS)
    ]


def gradients(model: LlamaForCausalLM, batch) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = token_loss(model, batch)
    (loss.loss_sum / loss.tokens).backward()
    return loss.loss_sum.item(), [parameter.grad.clone() for parameter in model.parameters()]


def test_packed_rows_give_the_loss_and_the_gradients_of_padded_ones(model):
    rows = random_rows()
    packs = [[rows[at] for at in bin_] for bin_ in best_fit_decreasing(LENGTHS, CAPACITY)]
    assert len(packs) < len(rows)
    padded_loss, padded = gradients(model, collate(rows, pad_id=0))
    packed_loss, packed = gradients(model, collate_packed(packs, CAPACITY, pad_id=0))
    assert packed_loss == pytest.approx(padded_loss, rel=1e-5)
    for one, other in zip(padded, packed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_rows_logits_do_not_depend_on_its_neighbours(model):
    _, second, third, *_ = random_rows()
    other = third._replace(input_ids=(third.input_ids % 63 + 1).astype(np.int32))
    logits = []
    for neighbour in (third, other):
        batch = collate_packed([[neighbour, second]], CAPACITY, pad_id=0)
        answer = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
        logits.append(answer[0, len(neighbour.input_ids) :][: len(second.input_ids)])
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    alone = model(torch.from_numpy(second.input_ids.astype(np.int64))[None]).logits[0]
    torch.testing.assert_close(alone, logits[0], rtol=1e-5, atol=1e-5)


def test_the_first_token_of_a_packed_row_carries_no_loss(model):
    rows = [row._replace(loss_mask=np.ones_like(row.loss_mask)) for row in random_rows()[:2]]
    batch = collate_packed([[rows[0]], [rows[1]]], CAPACITY, pad_id=0)
    assert batch.loss_mask.sum(1).tolist() == [LENGTHS[0] - 1, LENGTHS[1] - 1]
