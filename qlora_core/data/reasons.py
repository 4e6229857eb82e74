"""Why a row is not used: a short code, what it means, and what to do about it."""

from typing import NamedTuple


class Reason(NamedTuple):
    """One way in which a row can fail to become training data."""

    meaning: str
    remedy: str
    bad: bool = True
    """The row is broken, and counts against `data.max_bad_rows`; False for a row that merely does not apply."""


REASONS: dict[str, Reason] = {
    "not_json": Reason("the line is not JSON", "write one JSON object per line"),
    "bad_encoding": Reason("the line is not UTF-8", "save the file as UTF-8"),
    "uneven_row": Reason("a record has more or fewer fields than the header", "quote fields that hold commas"),
    "not_object": Reason("the row is not an object", "write each row as an object with named fields"),
    "unknown_format": Reason("the fields match no known format", "name the format in data.format or rename the fields"),
    "missing_field": Reason("a field that the format needs is missing", "add it, or set data.format to the right one"),
    "wrong_type": Reason("a field holds another type than it must", "text fields are strings, turns are lists"),
    "unknown_role": Reason("a turn has a role that is not known", "use system, user, assistant or tool"),
    "unknown_transcript": Reason(
        "the text is no transcript of a known form",
        "use ChatML, [INST] or ### Human:, or data.format: text, which learns all of it",
    ),
    "role_order": Reason("the turns are out of order", "a conversation starts with system or user turns"),
    "bad_tools": Reason("the tools are not a JSON list of objects", "write tools as a JSON list"),
    "bad_tool_call": Reason(
        "a tool call is not JSON with a name and arguments", 'write {"name": ..., "arguments": {...}}'
    ),
    "too_large": Reason("the row holds a thousand pages of text", "cut it into several rows"),
    "empty_message": Reason("a question or an answer is empty", "fill it in or remove the row"),
    "no_answer": Reason("there is no assistant turn to learn from", "add an answer or remove the row"),
    "broken_text": Reason("text was damaged when it was decoded", "export it again, as UTF-8"),
    "control_character": Reason("text holds invisible control characters", "remove them"),
    "placeholder": Reason("a placeholder was never filled in", "replace it with what it stands for"),
    "special_token": Reason("text holds a special token of the model", "remove it: it would end or start a turn"),
    "template": Reason("the chat template cannot render the row", "change the turns to what the template allows"),
    "too_long": Reason("the row is longer than data.seq_len_tokens", "raise data.seq_len_tokens", bad=False),
    "shortened": Reason(
        "the row is longer than data.seq_len_tokens and was cut between turns",
        "raise data.seq_len_tokens to keep it whole",
        bad=False,
    ),
    "duplicate": Reason("the same row came before", "nothing; one copy is kept", bad=False),
    "leak": Reason(
        "the same row is on the other side of the split", "nothing; the first is kept, so none is on both", bad=False
    ),
    "left_out": Reason(
        "`weight` or `max_rows` of its source leaves the row out", "nothing; raise them to use more", bad=False
    ),
    "near_duplicate": Reason(
        "another row says almost the same", "look at both; data.near_duplicates: drop removes the later one", bad=False
    ),
    "near_leak": Reason(
        "a row of the other side says almost the same, so evaluation would flatter the model",
        "split by a column that both share, or data.near_duplicates: drop",
        bad=False,
    ),
    "no_tool_call": Reason("the row has no tools or calls none", "nothing; data.tool_calls takes calls", bad=False),
}


class RowProblem(Exception):  # noqa: N818  # a finding about one row, counted and reported, never shown as an error
    """A row that cannot be used.

    Args:
        code: a key of `REASONS`.
        detail: what was found in this row.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail
