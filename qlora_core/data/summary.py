"""What happened to the rows: counts by reason with an example each, token counts, lengths, and rows to look at."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qlora_core.artifacts import Record
from qlora_core.data.reasons import REASONS, RowProblem

HISTOGRAM_BINS = 20


class Example(Record):
    """Where a reason was met first."""

    file: str
    row: int
    detail: str


class Drop(Record):
    """All rows that were dropped, or noticed, for one reason."""

    rows: int
    example: Example


@dataclass
class FileCounts:
    """What became of the rows of one file; a row that is trained on twice is two training rows."""

    read_rows: int = 0
    train_rows: int = 0
    evaluation_rows: int = 0
    dropped_rows: int = 0
    train_tokens: int = 0


class _ByReason:
    """Counts problems by their code and keeps the first of each; millions may pass."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._examples: dict[str, Example] = {}

    def count(self, problem: RowProblem, file: str, row: int) -> None:
        if problem.code not in self._examples:
            self._examples[problem.code] = Example(file=file, row=row, detail=problem.detail)
        self._rows[problem.code] += 1

    def records(self) -> dict[str, Drop]:
        return {code: Drop(rows=self._rows[code], example=example) for code, example in self._examples.items()}


class Tally:
    """Counts rows while they pass."""

    def __init__(self) -> None:
        self.files: defaultdict[str, FileCounts] = defaultdict(FileCounts)
        self._drops, self._notices = _ByReason(), _ByReason()

    def drop(self, problem: RowProblem, file: str, row: int) -> None:
        """Count a row that is not used."""
        self.files[file].dropped_rows += 1
        self._drops.count(problem, file, row)

    def notice(self, problem: RowProblem, file: str, row: int) -> None:
        """Count a row that is used, but that a person should know of."""
        self._notices.count(problem, file, row)

    @property
    def drops(self) -> dict[str, Drop]:
        """Reason code to the rows that are not used."""
        return self._drops.records()

    @property
    def notices(self) -> dict[str, Drop]:
        """Reason code to the rows that a person should know of, though they are kept."""
        return self._notices.records()

    @property
    def read(self) -> int:
        """Rows of all files."""
        return sum(file.read_rows for file in self.files.values())

    @property
    def dropped(self) -> dict[str, int]:
        """Reason code to rows."""
        return {code: drop.rows for code, drop in sorted(self.drops.items())}

    @property
    def bad(self) -> int:
        """Rows that are broken, without those that merely do not apply."""
        return sum(drop.rows for code, drop in self.drops.items() if REASONS[code].bad)

    def table(self) -> str:
        """One line a reason, most frequent first, with an example and what to do."""
        lines = []
        for code, drop in sorted(self.drops.items(), key=lambda item: -item[1].rows):
            example = drop.example
            lines.append(
                f"  {code:<15} {drop.rows:>8} rows: {REASONS[code].meaning}; first at {example.file}:{example.row} "
                f"({example.detail}). To do: {REASONS[code].remedy}"
            )
        return "\n".join(lines)

    @property
    def noticed(self) -> dict[str, int]:
        """Reason code to rows, of rows that are kept."""
        return {code: notice.rows for code, notice in sorted(self.notices.items())}


def files_as_json(tally: Tally, sources: Mapping[str, str]) -> list[dict[str, Any]]:
    """For summary.json: the files with their counts; `sources` says where each came from."""
    return [{"file": name, "source": sources[name], **asdict(counts)} for name, counts in tally.files.items()]


def counts_as_json(counts: Mapping[str, Drop]) -> dict[str, Any]:
    """For summary.json, most frequent first."""
    return {
        code: {"meaning": REASONS[code].meaning, "remedy": REASONS[code].remedy, **count.model_dump()}
        for code, count in sorted(counts.items(), key=lambda item: -item[1].rows)
    }


def histogram(lengths: Sequence[int], longest: int) -> dict[str, list[int]]:
    """Rows by length in tokens: `edges` has one element more than `rows`."""
    width = max(1, -(-longest // HISTOGRAM_BINS))
    edges = np.arange(0, width * (HISTOGRAM_BINS + 1), width)
    rows, _ = np.histogram(lengths, bins=edges)
    return {"edges_tokens": edges.tolist(), "rows": rows.tolist()}
