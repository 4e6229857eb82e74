"""What `registry_scale.py` measured, in words: how large MLflow's database gets, and how fast it answers then."""

from typing import Any

Row = dict[str, Any]
"""A line of its results."""

METRICS_A_STEP = 7
"""Of a training on a GPU; each is a row of MLflow's database."""
NIGHTLY, DAYS = 1_000, 365
ANSWERS = ("asked", "s, empty", "s, filled", "s, slowest")
ASKED = {
    "skip_decision": "has anything changed?",
    "find_by_fingerprint": "the version of a fingerprint",
    "models": "`qlora models`",
    "models_of_one_name": "`qlora models MODEL`, 1,000 versions",
    "promotion": "a promotion, under its lock",
    "open_runs": "which runs are open?",
    "repair_all": "`qlora reconcile`, the aliases of all models",
    "process: qlora models NAME": "`qlora models MODEL`, with its process",
    "process: qlora run RECIPE, nothing has changed": "`qlora run`, nothing has changed, with its process",
}


def growth(one: Row, full: Row, steps: float) -> str:
    """What the database takes, now and after a year.

    Args:
        one: as measured with one retraining.
        full: as measured when it was filled.
        steps: of a training.
    """
    added = {key: full[key] - one[key] for key in ("database_mb", "metrics_mb")}
    versions, points = (full["rows"][table] - one["rows"][table] for table in ("model_versions", "metrics"))
    point_kb, other_kb = (
        added["metrics_mb"] * 1e3 / points,
        (added["database_mb"] - added["metrics_mb"]) * 1e3 / versions,
    )
    logged = METRICS_A_STEP * steps
    kb = other_kb + logged * point_kb
    rows = full["rows"]
    return (
        f"- {rows['runs']:,} runs, {rows['model_versions']:,} versions of {rows['registered_models']:,} models and "
        f"{rows['metrics']:,} metric points: {full['database_mb']:,} MB, filled in {full['filled_in_s']} s.\n"
        f"- A retraining of {steps:.0f} steps: {kb:.0f} KB, of which {other_kb:.0f} for its runs and its version, and "
        f"{1e3 * point_kb:.0f} bytes for each of {logged:.0f} points.\n"
        f"- {NIGHTLY:,} recipes a night: {kb * NIGHTLY / 1e3:,.0f} MB a night, {kb * NIGHTLY * DAYS / 1e6:,.0f} GB a "
        "year, if all have new data."
    )


def answers(one: Row, full: Row) -> list[tuple[str, ...]]:
    """A line for everything that was timed: medians and the slowest call."""
    return [(said, *_seconds(name, one, full)) for name, said in ASKED.items()]


def _seconds(name: str, one: Row, full: Row) -> tuple[str, str, str]:
    before, after = (row["seconds"].get(name) for row in (one, full))
    return f"{before['median']:.2f}" if before else "", f"{after['median']:.2f}", f"{after['worst']:.2f}"
