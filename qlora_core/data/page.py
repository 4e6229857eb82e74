"""One HTML page of a prepared data set: counts, what was dropped and why, lengths, and rows with their trained text."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

CHART_WIDTH, CHART_HEIGHT, GAP = 640, 140, 2
TICKS = 4


def render_page(summary: Mapping[str, Any], preview: Sequence[Mapping[str, Any]]) -> str:
    """The page for what summary.json and preview.json hold; it loads nothing from elsewhere."""
    templates = Environment(loader=PackageLoader("qlora_core.data"), autoescape=True, undefined=StrictUndefined)
    page = templates.get_template("page.html.j2")
    return page.render(
        summary=summary,
        facts=_facts(summary),
        dropped_rows=sum(reason["rows"] for reason in summary["dropped"].values()),
        bars=_bars(summary["lengths"]),
        ticks=_ticks(summary["lengths"]["edges_tokens"][-1]),
        most=max(summary["lengths"]["rows"]),
        preview=preview,
    )


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    packed = summary["seq_len_tokens"] * summary["packing_efficiency"]
    facts = [
        ("Tokens to train on", f"{summary['train_tokens']:,}"),
        ("of which carry loss", _with_share(summary["trained_tokens"], summary["train_tokens"])),
        ("Longest row", f"{summary['longest_row_tokens']:,} of {summary['seq_len_tokens']:,} tokens"),
        ("Packed", f"{_packs(summary['train_tokens'], packed)}, {summary['packing_efficiency']:.1%} full"),
    ]
    if summary["forgetting_tokens"]:
        facts.append(("Plain text, to measure forgetting", f"{summary['forgetting_tokens']:,} tokens"))
    return facts


def _packs(tokens: int, tokens_a_pack: float) -> str:
    return f"into {round(tokens / tokens_a_pack):,} sequences"


def _with_share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.0%})"


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


def _ticks(longest: int) -> list[tuple[float, int]]:
    """Where on the axis which length stands."""
    return [(CHART_WIDTH * at / TICKS, longest * at // TICKS) for at in range(TICKS + 1)]
