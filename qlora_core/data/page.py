"""One HTML page of a prepared data set: counts, what was dropped and why, lengths, and rows with their trained text."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

FACTS = {
    "read_rows": "Rows read",
    "train_rows": "Training rows",
    "evaluation_rows": "Evaluation rows",
    "train_tokens": "Tokens in training rows",
    "trained_tokens": "of which carry loss",
    "longest_row_tokens": "Longest row",
    "forgetting_tokens": "Tokens of plain text, to measure forgetting",
}
CHART_WIDTH, CHART_HEIGHT, GAP = 640, 140, 2


def render_page(summary: Mapping[str, Any], preview: Sequence[Mapping[str, Any]]) -> str:
    """The page for what summary.json and preview.json hold; it loads nothing from elsewhere."""
    facts = [(name, f"{summary[key]:,}") for key, name in FACTS.items()]
    facts.append(("Packing efficiency", f"{summary['packing_efficiency']:.1%}"))
    templates = Environment(loader=PackageLoader("qlora_core.data"), autoescape=True, undefined=StrictUndefined)
    page = templates.get_template("page.html.j2")
    return page.render(
        facts=facts,
        dropped=summary["dropped"],
        noticed=summary["noticed"],
        bars=_bars(summary["lengths"]),
        preview=preview,
    )


def _bars(lengths: Mapping[str, Sequence[int]]) -> list[dict[str, float]]:
    edges, rows = lengths["edges_tokens"], lengths["rows"]
    step, most = CHART_WIDTH / len(rows), max(rows) or 1
    return [
        {
            "x": round(at * step, 1),
            "width": round(step - GAP, 1),
            "height": round(CHART_HEIGHT * count / most, 1),
            "start": edges[at],
            "end": edges[at + 1],
            "rows": count,
        }
        for at, count in enumerate(rows)
    ]
