"""What the matrix came to."""

from collections.abc import Sequence
from typing import Any

from tests.integration.faults.world import STAGES

MARKS = {"survived": "yes", "unharmed": "unharmed", "lost": "LOST", "skipped": "skipped"}


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a fault, a column a stage, and the sum."""
    faults = list(dict.fromkeys(cell["fault"] for cell in cells))
    came_to = {(cell["fault"], cell["stage"]): cell["came_to"] for cell in cells}
    lines = ["| fault | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    for fault in faults:
        marks = [MARKS.get(came_to.get((fault, stage), ""), "") for stage in STAGES]
        lines.append(f"| {fault} | " + " | ".join(marks) + " |")
    count = {kind: sum(cell["came_to"] == kind for cell in cells) for kind in MARKS}
    tried = len(cells) - count["skipped"]
    survived = count["survived"] + count["unharmed"]
    lines.append(
        f"\nfaults tried: {tried}, survived: {survived} ({count['unharmed']} of them without ending the command), "
        f"lost: {count['lost']}, skipped: {count['skipped']}"
    )
    return "\n".join(lines)
