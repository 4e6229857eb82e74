"""What a user writes about data."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from qlora_core.recipe.part import Fraction, Part
from qlora_core.recipe.sources import RowsSource, Share, Source


class ToolCalls(Part):
    """Turn conversations with tools into single calls: system prompt with the tools, user turns, one call as JSON."""

    system_prompt: str
    """Stands before the compact list of tools."""


class Split(Part):
    """Which rows are kept for evaluation: a stable hash of the key decides, so that new rows never move old ones."""

    by: Literal["row", "function", "column", "label"] = "row"
    """`function`: all rows that call one function land on the same side; `column`: all with one value in `column`;
    `label`: `column` says the side itself."""
    column: str | None = None
    """A field of the raw rows: a conversation's id, or the label."""
    evaluation_labels: tuple[str, ...] = ()
    """Rows whose label is one of these are for evaluation, all others for training."""
    evaluation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _column_where_it_is_used(self) -> Self:
        if (self.by in ("column", "label")) != (self.column is not None):
            raise PydanticCustomError("split_column", "`by: column` and `by: label` need a `column`, nothing else does")
        if (self.by == "label") != bool(self.evaluation_labels):
            raise PydanticCustomError("split_labels", "`by: label` needs `evaluation_labels`, and nothing else does")
        return self


class DataRecipe(Part):
    """Prepare: from raw files to tokens and loss masks."""

    rows: Annotated[tuple[RowsSource, ...], Field(min_length=1)]
    evaluation_rows: tuple[Source, ...] = ()
    """Rows for evaluation alone; those of `rows` are then all for training, and `split` is not used."""
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "transcript", "text"] = "auto"
    """`text`: the field `text` is learnt as it is, whole, without the chat template."""
    loss: Literal["assistant_turns", "last_turn", "everything"] = "assistant_turns"
    """What is learnt: the assistant's turns with their ends, only the last of them, or every token."""
    tool_calls: ToolCalls | None = None
    seq_len_tokens: Annotated[int, Field(ge=8, le=1_048_576)] = 2048
    too_long: Literal["drop", "truncate", "split", "fail"] = "drop"
    """What happens to longer rows: dropped; cut to as many exchanges as fit; cut into several rows, each with the
    system prompt; or the stage fails. A single exchange that is too long is dropped. All are counted."""
    split: Split = Split()
    near_duplicates: Literal["report", "drop", "ignore"] = "report"
    """Rows whose words are almost those of an earlier row, of their own side or of the other side of the split."""
    max_bad_rows: Fraction = 0.01
    """More unreadable rows than this share fail the stage."""
    forgetting: tuple[Source, ...] = ()
    """Plain text whose perplexity is measured before and after, as a check against forgetting."""
    forgetting_tokens: Annotated[int, Field(ge=64)] = 4096

    @property
    def shares(self) -> tuple[Share, ...]:
        """How much of each source of `rows` is used."""
        return tuple(Share(weight=source.weight, max_rows=source.max_rows) for source in self.rows)

    @model_validator(mode="after")
    def _one_kind_of_split(self) -> Self:
        if self.evaluation_rows and self.split != Split():
            raise PydanticCustomError("two_splits", "`evaluation_rows` are given, so `split` has no use; remove one")
        return self
