"""Tasks of the lm-evaluation-harness, from files of this machine; its package comes with the extra `eval`.

Gao et al., A framework for few-shot language model evaluation, doi:10.5281/zenodo.12608602.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qlora_core.artifacts import Directions, Scores
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.scored import HarnessRow
from qlora_core.recipe import Harness

SPREAD = "_stderr"
TOLERANCE = 1e-9


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    harness: Harness,
    batch_size: int,
    seed: int,
    cache: Path,
) -> tuple[list[HarnessRow], Scores, Directions]:
    """What the model scores on each example, the scores that are no mean over examples, and which way each is better.

    Scores are called `<task>_<metric>`.

    Paths in the tasks' YAML files start in their folder; nothing is fetched.

    Raises:
        EvaluationError: a task cannot be loaded.
    """
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}  # read when datasets is imported
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with chdir(harness.folder):
        manager = TaskManager(include_path=str(harness.folder), include_defaults=False)
        unknown = [task for task in harness.tasks if task not in manager.all_tasks]
        if unknown:
            raise EvaluationError(
                f"evaluation.harness.tasks names {', '.join(unknown)}, which no YAML file of {harness.folder} defines; "
                f"it defines {', '.join(manager.all_tasks) or 'none'}"
            )
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size),
            tasks=list(harness.tasks),
            task_manager=manager,
            limit=harness.max_examples,
            bootstrap_iters=0,
            apply_chat_template=harness.chat,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    totals = _totals(found["results"])
    rows = [row for task, samples in found["samples"].items() for row in _rows(task, samples, totals)]
    means = {score for row in rows for score in row.metrics}
    others = {score: value for score, value in totals.items() if score not in means}
    return rows, others, _directions(found["results"], found.get("higher_is_better", {}))


def _totals(results: Mapping[str, Mapping[str, Any]]) -> Scores:
    """The harness's own figures for tasks and groups."""
    return {
        _name(task, *metric.split(",")): float(value)
        for task, values in results.items()
        for metric, value in values.items()
        if "," in metric and SPREAD not in metric and isinstance(value, int | float)
    }


def _directions(
    results: Mapping[str, Mapping[str, Any]], higher_is_better: Mapping[str, Mapping[str, bool | None]]
) -> Directions:
    """Which way each score is better, where its task or group says so."""
    found: Directions = {}
    for task, values in results.items():
        for metric in values:
            higher = higher_is_better.get(task, {}).get(metric.partition(",")[0])
            if "," in metric and higher is not None:
                found[_name(task, *metric.split(","))] = "higher" if higher else "lower"
    return found


def _rows(task: str, samples: Iterable[Mapping[str, Any]], totals: Scores) -> Iterable[HarnessRow]:
    """One row an example, with the metrics whose mean over examples is what the harness says."""
    by_example: dict[int, dict[str, float]] = {}
    for sample in samples:
        values = {_name(task, metric, sample["filter"]): sample[metric] for metric in sample["metrics"]}
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        by_example.setdefault(int(sample["doc_id"]), {}).update(numbers)
    names = [name for name in totals if all(name in metrics for metrics in by_example.values())]
    means = {name: sum(metrics[name] for metrics in by_example.values()) / len(by_example) for name in names}
    kept = [name for name in names if abs(means[name] - totals[name]) < TOLERANCE]
    for example, metrics in sorted(by_example.items()):
        yield HarnessRow(task=task, example=example, metrics={name: metrics[name] for name in kept})


def _name(task: str, metric: str, filtered: str) -> str:
    return f"{task}_{metric}" if filtered == "none" else f"{task}_{metric}_{filtered}"
