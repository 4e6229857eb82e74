"""Numbers as people read them."""

import math
from datetime import UTC, datetime

from qlora_core.evaluation.metrics import describe

NARROW_SPACE = "\u202f"


def format_score(name: str, value: float | None) -> str:
    """A score as people read it: shares in percent, numbers with three significant digits."""
    if value is None:
        return "\u2013"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if describe(name).unit == "share":
        return f"{100 * value:.1f}{NARROW_SPACE}%"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}"


def format_time(iso: str) -> str:
    """`5 January 2026, 13:45 UTC`."""
    time = datetime.fromisoformat(iso).astimezone(UTC)
    return f"{time.day} {time:%B %Y, %H:%M} UTC"


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_energy(joules: float) -> str:
    """`0.42 Wh`, `12 Wh`, `3.4 kWh`."""
    hours = joules / 3600
    if hours >= 1000:
        return f"{hours / 1000:.1f} kWh"
    return f"{hours:.0f} Wh" if hours >= 10 else f"{hours:.2g} Wh"


def round_score(name: str, value: float) -> str:
    """A score for a headline: whole percents, except where that would claim all or nothing."""
    percent = 100 * value
    if describe(name).unit == "share" and (percent in (0, 100) or 0 < round(percent) < 100):
        return f"{percent:.0f}{NARROW_SPACE}%"
    return format_score(name, value)


def signed(value: float) -> str:
    """With its sign, and one decimal below a hundred."""
    return f"{value:+.{1 if abs(value) < 100 else 0}f}".replace("-", "\u2212")
