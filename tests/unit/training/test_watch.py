"""What ends a run: divergence, a loss that jumps, an evaluation loss that no longer falls."""

import pytest

from qlora_core.errors import TrainingError
from qlora_core.events import Metrics
from qlora_core.recipe import EarlyStopping, LossSpike
from qlora_core.training.stopping import best_evaluation, is_exhausted
from qlora_core.training.watch import SKIPPED_UPDATES, refuse_divergence, refuse_spike, steps_in_spike

LIMITS = LossSpike(rise=1.0, window_steps=5, patience_steps=3)
INFINITE = float("inf")


def history(*losses: float, key: str = "loss") -> list[Metrics]:
    return [Metrics(step=step, values={key: loss}) for step, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize(("loss", "grad_norm"), [(float("nan"), 1.0), (1.0, INFINITE), (INFINITE, 1.0)])
def test_divergence_stops_before_it_is_saved(loss, grad_norm):
    with pytest.raises(TrainingError, match=r"step 7 .*Lower train\.learning_rate"):
        refuse_divergence(7, loss, grad_norm)


def test_fp16_may_skip_some_updates_while_it_looks_for_its_scale():
    refuse_divergence(1, 2.0, INFINITE, unscaled_before=SKIPPED_UPDATES - 1)
    with pytest.raises(TrainingError):
        refuse_divergence(1, 2.0, INFINITE, unscaled_before=SKIPPED_UPDATES)


def test_a_single_hard_batch_is_watched_and_forgiven():
    assert steps_in_spike(history(2, 2, 2, 2, 2, 9), LIMITS) == 1
    assert steps_in_spike(history(2, 2, 2, 2, 2, 9, 2), LIMITS) == 0
    refuse_spike(history(2, 2, 2, 2, 2, 9, 9), LIMITS)


def test_a_loss_that_stays_high_stops_with_where_it_began():
    with pytest.raises(TrainingError, match=r"rose to 9\.000 at step 8: since step 6"):
        refuse_spike(history(2, 2, 2, 2, 2, 9, 8, 9), LIMITS)


def test_a_high_beginning_is_no_spike():
    refuse_spike(history(9, 9, 9, 2), LIMITS)


def test_patience_counts_evaluations_without_improvement():
    losses = (3.0, 2.0, 2.1, 1.995)
    evaluated = history(*losses, key="evaluation_loss")
    assert best_evaluation(evaluated) == (4, 1.995)
    assert is_exhausted(evaluated, EarlyStopping(patience=2, min_improvement=0.01))
    assert not is_exhausted(evaluated, EarlyStopping(patience=2))
