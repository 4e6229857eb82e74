import math
from pathlib import Path

import pytest
import torch

from qlora_core.artifacts import PreparedDataset
from qlora_core.evaluation.likelihood import row_losses
from qlora_core.evaluation.scored import RowLoss, Rows, row_sums
from qlora_core.modeling.load import load_full
from qlora_core.modeling.rows import TokenRows


@pytest.mark.parametrize("name", ["evaluation", "forgetting"])
def test_loss_equals_that_of_plain_transformers_on_the_same_tokens(
    model_path: Path, dataset: PreparedDataset, name: str
) -> None:
    model = load_full(model_path, torch.device("cpu"))
    rows = TokenRows(dataset.path / f"{name}.arrow")
    losses = list(row_losses(model, rows, 0, lambda _: None))
    for row, loss in zip((rows[i] for i in range(len(rows))), losses, strict=True):
        ids = torch.tensor(row.input_ids).long()[None]
        labels = ids.masked_fill(torch.tensor(row.loss_mask)[None] == 0, -100)
        with torch.inference_mode():
            reference = model(input_ids=ids, labels=labels).loss.item()
        assert loss.tokens == int((labels[0, 1:] != -100).sum())
        assert loss.loss_sum / loss.tokens == pytest.approx(reference, rel=1e-5)


def scores_of(*losses: RowLoss) -> dict[str, float]:
    return {name: sums.score for name, sums in row_sums(Rows(losses=losses)).items()}


def test_perplexity_weighs_tokens_and_not_rows() -> None:
    scores = scores_of(
        RowLoss(row_id="a", loss_sum=9.0, correct=1, tokens=3), RowLoss(row_id="b", loss_sum=1.0, correct=1, tokens=1)
    )
    assert scores == {"loss": 2.5, "perplexity": pytest.approx(math.exp(2.5)), "token_accuracy": 0.5}


def test_a_hopeless_loss_gives_an_infinite_perplexity() -> None:
    assert scores_of(RowLoss(row_id="a", loss_sum=1e6, correct=0, tokens=1))["perplexity"] == math.inf


def test_rows_without_trained_tokens_have_no_loss() -> None:
    assert math.isnan(scores_of(RowLoss(row_id="a", loss_sum=0, correct=0, tokens=0))["loss"])
