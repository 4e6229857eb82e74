"""Recheck: the champion on the recipe's data of today, against what it scored when it was judged."""

import json

from prefect import task

from qlora_core.artifacts import ModelScores, Record
from qlora_core.evaluation import evaluate as evaluation
from tasks.fetching import model_folder
from tasks.foreign import with_digest
from tasks.keys import scores_key
from tasks.preflight import prepared
from tasks.registry import ModelRegistry, Version
from tasks.stage import RETRYING, Stage
from tasks.tags import SCORES
from tasks.tracking import Described, Retraining

METRIC = "loss"
"""What every model is scored by."""


class Recheck(Record):
    """How a champion does on fresh data."""

    name: str
    version: int
    before: float | None
    """Its loss when it was judged, or looked at first; None if this was the first look."""
    now: float
    drifted: bool

    @property
    def sentence(self) -> str:
        """For people."""
        if self.before is None:
            return f"{self.name} version {self.version} was never scored here; its loss of {self.now:.4g} is kept"
        verdict = "has drifted" if self.drifted else "holds"
        return f"{self.name} version {self.version} {verdict}: loss {self.before:.4g} then, {self.now:.4g} now"


@task(name="recheck", task_run_name="recheck {champion.name}", timeout_seconds=6 * 3600, **RETRYING)
def recheck(retraining: Retraining, champion: Version, tolerance: float) -> Recheck:
    """Score the champion on fresh rows, in a nested run of the retraining that made it; each look adds a point.

    Args:
        retraining: the retraining that made the champion, with the recipe whose data is looked at.
        champion: whom to score.
        tolerance: how much the loss may have grown, as a share of what it was.
    """
    recipe = retraining.recipe
    with Stage("recheck", retraining) as stage:
        _, dataset = prepared(recipe, stage.settings, stage.report)
        registry = ModelRegistry(stage.settings)
        champion = with_digest(registry, champion)
        digest = champion.identity
        key = scores_key(recipe, digest, dataset)
        with stage.recorded(key) as run:
            folder = model_folder(registry, champion)
            scores = stage.part(
                "scores",
                key,
                ModelScores,
                lambda into, report: evaluation.evaluate(
                    recipe.evaluation, recipe.seed, folder, digest, dataset, into, report
                ),
                keep=evaluation.KEEP,
            )
            before, now = champion.scores.get(METRIC), scores.scores[METRIC]
            if before is None:
                registry.tag(champion, {SCORES: json.dumps(scores.scores)})
            found = Recheck(
                name=champion.name,
                version=champion.number,
                before=before,
                now=now,
                drifted=before is not None and now > before * (1 + tolerance),
            )
            tags = {"qlora.recheck": json.dumps(found.model_dump(mode="json")), "qlora.data_digest": dataset.digest}
            run.describe(Described(metrics=scores.scores, tags=tags))
        stage.display.done(found.sentence)
        return found
