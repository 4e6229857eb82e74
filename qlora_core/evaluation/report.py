"""One page that says whether the candidate was promoted, why, and what changed; and the same as data."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qlora_core.artifacts import (
    Direction,
    EvaluationReport,
    GateResult,
    Interval,
    ModelScores,
    PreparedDataset,
    PromotionDecision,
    Scores,
)
from qlora_core.evaluation.examples import compare_answers
from qlora_core.evaluation.plots import plot_learning_rate, plot_lengths, plot_loss, read_curve
from qlora_core.evaluation.records import ReportContext
from qlora_core.evaluation.scored import read_rows
from qlora_core.evaluation.wording import (
    NARROW_SPACE,
    format_energy,
    format_score,
    format_seconds,
    format_time,
    round_score,
    signed,
)
from qlora_core.modeling.rows import TokenRows
from qlora_core.scores import SCORES, describe, direction_of
from qlora_core.store import write_atomically

EXAMPLES = 8
SPLITS = {"training": "train", "evaluation": "evaluation"}


class Change(NamedTuple):
    """How a score of the candidate differs from that of another model, as text."""

    difference: str
    interval: str
    trend: str
    """`better`, `worse`, `unsure` when the interval holds both, `same` when there is nothing to judge."""


class ScoreLine(NamedTuple):
    """One line of the before/after table, values as text."""

    title: str
    values: tuple[str, ...]
    """Base, candidate and, if there is one, champion."""
    changes: tuple[Change, ...]
    """Of the candidate against the base and, if there is one, the champion."""


class GateLine(NamedTuple):
    """One gate in words."""

    title: str
    rule: str
    value: str
    passed: bool
    note: str
    """What else there is to say, such as a missing score."""


def write_report(
    report: EvaluationReport,
    models: Mapping[str, ModelScores],
    decision: PromotionDecision,
    dataset: PreparedDataset,
    context: ReportContext,
    into: Path,
) -> None:
    """Write `report.html` and `report.json`."""
    comparison = compare_answers({name: read_rows(scores.path).answers for name, scores in models.items()}, EXAMPLES)
    verdict = state_verdict(decision, report, context.needs_approval)
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            verdict=verdict,
            decision=decision,
            report=report,
            context=context,
            gates=[_gate_line(gate) for gate in decision.gates],
            models=[name.capitalize() for name in models],
            score_lines=[_score_line(name, report) for name in _score_names(models)],
            comparison=comparison,
            plots=_plots(dataset, context),
            dataset=dataset,
            costs=_costs(read_curve(context.curve), context.timings_s),
            created=format_time(context.created),
            seconds=format_seconds,
        )
    )
    write_atomically(into / "report.html", page)
    data = {
        "verdict": verdict,
        "decision": decision.model_dump(mode="json"),
        "models": {
            name: scores.model_dump(mode="json", include={"model_digest", "data_digest", "scores", "rows", "seed"})
            for name, scores in models.items()
        },
        "differences": report.model_dump(mode="json")["differences"],
        "answers": {"rival": comparison.rival, "better": comparison.better, "worse": comparison.worse},
        "examples": [example.model_dump(mode="json") for example in comparison.examples],
        "data": dataset.model_dump(mode="json", exclude={"path"}),
        "context": context.model_dump(mode="json", exclude={"curve"}),
        "curve": read_curve(context.curve),
    }
    write_atomically(into / "report.json", json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False))


def state_verdict(decision: PromotionDecision, report: EvaluationReport, needs_approval: bool = False) -> str:
    """The decision in one sentence that needs no knowledge of the field.

    A promotion names the score that a gate asked for and that people read most easily (a share, else the first);
    a refusal names the gates that failed.
    """
    if not decision.promote:
        failed = [gate for gate in decision.gates if not gate.passed]
        more = f"; and {len(failed) - 2} more" if len(failed) > 2 else ""
        return "Not promoted: " + "; ".join(_failure(gate) for gate in failed[:2]) + more + "."
    done = "Passed its gates" if needs_approval else "Promoted"
    metric = _headline(decision, report)
    if metric is None:
        return f"{done}: {decision.reason}."
    before, after = report.base.get(metric), report.candidate[metric]
    title = describe(metric).title.lower()
    if before is None or before == after:
        return f"{done}: {title} {'is' if before is None else 'stays at'} {round_score(metric, after)}."
    verb = "rose" if after > before else "fell"
    return f"{done}: {title} {verb} from {round_score(metric, before)} to {round_score(metric, after)}."


def _headline(decision: PromotionDecision, report: EvaluationReport) -> str | None:
    asked = [gate.metric for gate in decision.gates if gate.metric in report.candidate]
    shares = [metric for metric in asked if describe(metric).unit == "share"]
    return next(iter(shares or asked), None)


def _failure(gate: GateResult) -> str:
    title = describe(gate.metric).title.lower()
    if gate.value is None or gate.reference is None:
        return f"{title} could not be compared, {gate.reason}"
    reached = f"{title} reached {format_score(gate.metric, gate.value)}"
    if gate.significant is False:
        return f"{reached}, too few rows to be sure that this is {_rule(gate)}"
    return f"{reached} but must be {_rule(gate)}"


def _rule(gate: GateResult) -> str:
    """The rule in words: `above 0 % (base)`."""
    if gate.limit is None:
        return f"better than the {gate.against}"
    words = {"<": "below", "<=": "at most", ">": "above", ">=": "at least"}[gate.required.partition(" ")[0]]
    origin = ""
    if gate.against != "threshold":
        reference = format_score(gate.metric, gate.reference)
        origin = f" ({gate.against})" if gate.limit == gate.reference else f" ({gate.against} {reference})"
    return f"{words} {format_score(gate.metric, gate.limit)}{origin}"


def _gate_line(gate: GateResult) -> GateLine:
    note = gate.reason if gate.limit is None or gate.value is None else ""
    if gate.significant is not None:
        note = "and surely so" if gate.significant else "it is, but not surely so (95 % interval)"
    return GateLine(describe(gate.metric).title, _rule(gate), format_score(gate.metric, gate.value), gate.passed, note)


def _score_names(models: Mapping[str, ModelScores]) -> list[str]:
    """Every score of any model: those the table knows in its order, then the others."""
    names = {name for scores in models.values() for name in scores.scores}
    known = [name for name in SCORES if name in names]
    return known + sorted(names - set(known))


def _score_line(name: str, report: EvaluationReport) -> ScoreLine:
    models = {"base": report.base, "candidate": report.candidate} | (
        {"champion": report.champion} if report.champion is not None else {}
    )
    others: tuple[tuple[Literal["base", "champion"], Scores | None], ...] = (
        ("base", report.base),
        ("champion", report.champion),
    )
    changes = tuple(
        _change(
            name,
            report.candidate.get(name),
            scores.get(name),
            report.differences.get(other, {}).get(name),
            direction_of(name) or report.directions.get(name),
        )
        for other, scores in others
        if scores is not None
    )
    return ScoreLine(
        describe(name).title, tuple(format_score(name, scores.get(name)) for scores in models.values()), changes
    )


def _change(
    name: str, value: float | None, reference: float | None, interval: Interval | None, direction: Direction | None
) -> Change:
    """The difference in points for shares, in percent of the reference for everything else."""
    if value is None or reference is None or not (math.isfinite(value) and math.isfinite(reference)):
        return Change("", "", "same")
    share = describe(name).unit == "share"
    scale = 100 if share else 100 / abs(reference) if reference else None
    if value == reference or scale is None:
        return Change("", "", "same")
    arrow, unit = "↑" if value > reference else "↓", "points" if share else "%"
    difference = f"{arrow} {signed((value - reference) * scale)}{NARROW_SPACE}{unit}"
    span = "" if interval is None else f"{signed(interval.low * scale)} to {signed(interval.high * scale)}"
    return Change(difference, span, _trend(direction, value - reference, interval))


def _trend(direction: Direction | None, difference: float, interval: Interval | None) -> str:
    if direction is None:
        return "same"
    if interval is not None and interval.low <= 0 <= interval.high:
        return "unsure"
    return "better" if (difference < 0) == (direction == "lower") else "worse"


def _plots(dataset: PreparedDataset, context: ReportContext) -> dict[str, Markup]:
    """SVG by name; empty where there is nothing to plot."""
    points = read_curve(context.curve)
    lengths = {
        name: TokenRows(path).lengths.tolist()
        for name, path in ((name, dataset.path / f"{file}.arrow") for name, file in SPLITS.items())
        if path.is_file()
    }
    logged = {name for point in points for name in point}
    return {
        "loss": Markup(plot_loss(points) if "loss" in logged else ""),
        "learning_rate": Markup(plot_learning_rate(points) if "learning_rate" in logged else ""),
        "lengths": Markup(plot_lengths(lengths) if any(lengths.values()) else ""),
    }


def _costs(points: Sequence[Mapping[str, float]], timings_s: Mapping[str, float]) -> list[tuple[str, str]]:
    """What the candidate has cost, as far as it was measured."""
    costs = [("All stages", format_seconds(sum(timings_s.values())))] if timings_s else []
    if points:
        costs.append(("Training steps", f"{points[-1]['step']:,.0f}"))
    speeds = [point["tokens_per_s"] for point in points if "tokens_per_s" in point]
    if speeds:
        costs.append(("Training tokens per second, median", f"{median(speeds):,.0f}"))
    memory = [point["peak_memory_gib"] for point in points if "peak_memory_gib" in point]
    if memory:
        costs.append(("Peak GPU memory", f"{max(memory):.1f} GiB"))
    energy = [point["gpu_energy_j"] for point in points if "gpu_energy_j" in point]
    if energy:
        costs.append(("Energy of the GPUs in training", format_energy(sum(energy))))
    return costs


def _finite(value: Any) -> Any:
    """The same data with null for numbers that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("qlora_core.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
