"""From raw rows to rendered conversations; every row that does not get there is counted with the reason."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qlora_core.artifacts import DataFile, DataSnapshot
from qlora_core.data.checks import TextChecks
from qlora_core.data.conversation import Conversation, content_key
from qlora_core.data.formats import to_conversation
from qlora_core.data.read import read_rows
from qlora_core.data.reasons import RowProblem
from qlora_core.data.reuse import Earlier, Known
from qlora_core.data.seen import SeenKeys
from qlora_core.data.split import copies, in_evaluation
from qlora_core.data.summary import Tally
from qlora_core.data.template import ChatTemplate, Rendered
from qlora_core.data.tool_calls import single_call
from qlora_core.modeling.rows import PromptRow
from qlora_core.recipe import DataRecipe, Share


class Candidate(NamedTuple):
    """A row that is good but for its length, which nobody knows before it is tokenized."""

    file: str
    row: int
    key: bytes
    evaluation: bool
    rendered: Rendered
    prompt: PromptRow | None
    """For an evaluation row; its ids are still missing."""
    known: Known | None
    """The tokens, if an earlier data set has them."""
    conversation: Conversation
    copies: int = 1
    """How often it is trained on."""

    @property
    def said(self) -> str:
        """The words of user and assistant."""
        return " ".join(m.content for m in self.conversation.messages if m.role in ("user", "assistant"))

    @property
    def row_id(self) -> str:
        """`file:row`, which identifies the row for people."""
        return f"{self.file}:{self.row}"


class Candidates:
    """Reads, checks and renders the rows of a snapshot; iterate once."""

    def __init__(self, recipe: DataRecipe, seed: int, template: ChatTemplate, earlier: Earlier, tally: Tally) -> None:
        self._recipe, self._seed, self._template, self._earlier, self._tally = recipe, seed, template, earlier, tally
        self._seen = (SeenKeys(), SeenKeys())
        """Of the training and of the evaluation rows."""
        self._shares, self._used = recipe.shares, [0] * len(recipe.rows)
        self._checks = TextChecks(template.special_tokens)

    def of(self, raw: DataSnapshot) -> Iterator[Candidate]:
        """The candidates in the order of the files and their rows, those for evaluation alone first."""
        for file in raw.evaluation:
            yield from self._of_file(raw.path, file, evaluation=True)
        for file in raw.rows:
            yield from self._of_file(raw.path, file, evaluation=False if raw.evaluation else None)

    def _of_file(self, folder: Path, file: DataFile, evaluation: bool | None) -> Iterator[Candidate]:
        """The candidates of one file; `evaluation` is the side of all its rows, None if they are split."""
        counts = self._tally.files[file.name]
        for number, value in read_rows(folder / file.name):
            counts.read_rows += 1
            try:
                if isinstance(value, RowProblem):
                    raise value
                conversation = to_conversation(value, self._recipe.format, file.name, number)
                group = self._group(conversation, value) if evaluation is None else None
                if self._recipe.tool_calls is not None:
                    conversation = single_call(conversation, self._recipe.tool_calls.system_prompt)
                self._checks.check(conversation)
                key = content_key(conversation)
                side = self._side(group, key) if evaluation is None else evaluation
                times = self._times(file.entry, key) if not evaluation else 1
                self._refuse_known(key, side)
                yield self._candidate(conversation, key, side)._replace(copies=times)
                if not evaluation:
                    self._used[file.entry] += 1
            except RowProblem as problem:
                self._tally.drop(problem, file.name, number)

    def _side(self, group: str | None, key: bytes) -> bool:
        """Whether the row is for evaluation."""
        split = self._recipe.split
        if split.by == "label":
            return group in split.evaluation_labels
        return in_evaluation(group or key.hex(), self._seed, split.evaluation_fraction)

    def _times(self, entry: int, key: bytes) -> int:
        """How often a row of this source is used."""
        share: Share = self._shares[entry]
        if share.max_rows is not None and self._used[entry] >= share.max_rows:
            raise RowProblem("left_out", f"data.rows[{entry}] has max_rows {share.max_rows}")
        times = 1 if share.weight == 1 else copies(key.hex(), share.weight)
        if times == 0:
            raise RowProblem("left_out", f"data.rows[{entry}] has weight {share.weight}")
        return times

    def _refuse_known(self, key: bytes, evaluation: bool) -> None:
        if key in self._seen[not evaluation]:
            raise RowProblem("leak", f"the same stands in the {'training' if evaluation else 'evaluation'} rows")
        if not self._seen[evaluation].add(key):
            raise RowProblem("duplicate", "the same turns and tools came before")

    def _group(self, conversation: Conversation, row: dict[str, Any]) -> str | None:
        """What all rows have in common that must land on the same side; None for a row that stands alone."""
        split = self._recipe.split
        if split.by == "function":
            return conversation.function
        if split.column is None:
            return None
        if row.get(split.column) is None:
            raise RowProblem("missing_field", f"data.split.column is `{split.column}`, which the row has not")
        return str(row[split.column])

    def _candidate(self, conversation: Conversation, key: bytes, evaluation: bool) -> Candidate:
        known = self._earlier.find(key, evaluation)
        rendered = Rendered("", ()) if known else self._template.render(conversation, self._recipe.loss)
        prompt = self._template.prompt(conversation, rendered) if evaluation and not known else None
        return Candidate(conversation.file, conversation.row, key, evaluation, rendered, prompt, known, conversation)
