"""From raw rows to rendered conversations; every row that does not get there is counted with the reason."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from qlora_core.artifacts import DataSnapshot
from qlora_core.data.checks import TextChecks
from qlora_core.data.conversation import Conversation, content_key
from qlora_core.data.formats import to_conversation
from qlora_core.data.read import read_rows
from qlora_core.data.reasons import RowProblem
from qlora_core.data.reuse import Earlier, Known
from qlora_core.data.seen import SeenKeys
from qlora_core.data.split import in_evaluation
from qlora_core.data.summary import Tally
from qlora_core.data.template import ChatTemplate, Rendered
from qlora_core.data.tool_calls import single_call
from qlora_core.modeling.rows import PromptRow
from qlora_core.recipe import DataRecipe


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
        self._seen = SeenKeys()
        self._checks = TextChecks(template.special_tokens)

    def of(self, raw: DataSnapshot) -> Iterator[Candidate]:
        """The candidates in the order of the files and their rows."""
        for file in raw.rows:
            for number, value in read_rows(raw.path / file.name):
                self._tally.read += 1
                try:
                    if isinstance(value, RowProblem):
                        raise value
                    conversation = to_conversation(value, self._recipe.format, file.name, number)
                    yield self._candidate(conversation, self._group(conversation, value))
                except RowProblem as problem:
                    self._tally.drop(problem, file.name, number)

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

    def _candidate(self, conversation: Conversation, group: str | None) -> Candidate:
        if self._recipe.tool_calls is not None:
            conversation = single_call(conversation, self._recipe.tool_calls.system_prompt)
        self._checks.check(conversation.messages)
        key = content_key(conversation)
        if not self._seen.add(key):
            raise RowProblem("duplicate", "the same turns and tools came before")
        evaluation = in_evaluation(group or key.hex(), self._seed, self._recipe.split.evaluation_fraction)
        known = self._earlier.find(key, evaluation)
        rendered = Rendered("", ()) if known else self._template.render(conversation, self._recipe.loss)
        prompt = self._template.prompt(conversation, rendered) if evaluation and not known else None
        return Candidate(conversation.file, conversation.row, key, evaluation, rendered, prompt, known, conversation)
