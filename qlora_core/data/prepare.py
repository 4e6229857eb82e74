"""The front door of data preparation: raw files to token ids and loss masks, split into training and evaluation.

    read -> conversation -> (one call) -> rendered text and spans -> ids and mask -> train or evaluation

Every row that does not arrive is counted with the reason, see `reasons.py`.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_core.artifacts import DataSnapshot, ModelSnapshot, PreparedDataset
from qlora_core.data.conversation import Conversation, content_key
from qlora_core.data.formats import to_conversation
from qlora_core.data.packing import efficiency
from qlora_core.data.read import inspect, read_rows, read_text
from qlora_core.data.reasons import RowProblem
from qlora_core.data.split import in_evaluation
from qlora_core.data.summary import Tally, histogram, segments
from qlora_core.data.template import ChatTemplate, Rendered
from qlora_core.data.tokenize import Tokens, tokenize
from qlora_core.data.tool_calls import single_call
from qlora_core.errors import DataError
from qlora_core.events import Note, Progress, Report
from qlora_core.modeling.rows import PromptRow, TokenRow, write_prompts, write_token_rows
from qlora_core.modeling.tokenizer import load_tokenizer, template_digest, tokenizer_digest
from qlora_core.recipe import DataRecipe
from qlora_core.store import write_atomically

VERSION = 1
CHUNK_ROWS = 1024
PREVIEW_ROWS = 3
FORGETTING_WINDOW_TOKENS = 512


class _Candidate(NamedTuple):
    """A row that was read and rendered, not yet tokenized."""

    conversation: Conversation
    rendered: Rendered
    evaluation: bool


class _Row(NamedTuple):
    """A row that is kept."""

    candidate: _Candidate
    tokens: Tokens

    def for_disk(self) -> TokenRow:
        return TokenRow(self.candidate.conversation.place, self.tokens.ids, self.tokens.mask)


def prepare(
    recipe: DataRecipe, seed: int, base: ModelSnapshot, raw: DataSnapshot, into: Path, report: Report
) -> PreparedDataset:
    """Write the files that `modeling/rows.py` describes, with summary.json and preview.json, into `into`.

    Raises:
        DataError: too many rows are unreadable, one side of the split is empty, or the chat template cannot be used.
    """
    tokenizer = load_tokenizer(base.path)
    template = ChatTemplate(tokenizer)
    tally = Tally()
    rows = list(_keep(recipe, seed, raw, tokenizer, template, tally, report))
    train = [row for row in rows if not row.candidate.evaluation]
    evaluation = [row for row in rows if row.candidate.evaluation]
    _check(recipe, tally, len(train), len(evaluation))
    write_token_rows(into / "train.arrow", (row.for_disk() for row in train))
    write_token_rows(into / "evaluation.arrow", (row.for_disk() for row in evaluation))
    write_prompts(into / "prompts.arrow", _prompts(evaluation, template, tokenizer))
    forgetting = _forgetting(recipe, raw, tokenizer)
    write_token_rows(into / "forgetting.arrow", forgetting)
    _write_preview(into / "preview.json", train[:PREVIEW_ROWS])
    record = _record(recipe, tokenizer, tally, train, evaluation, forgetting, into)
    _write_summary(into / "summary.json", record, tally, [len(row.tokens.ids) for row in rows])
    report(Note(message=_sentence(record)))
    return record


def _keep(
    recipe: DataRecipe,
    seed: int,
    raw: DataSnapshot,
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    tally: Tally,
    report: Report,
) -> Iterator[_Row]:
    candidates = _candidates(recipe, seed, raw, template, tally)
    while chunk := list(islice(candidates, CHUNK_ROWS)):
        tokenized = tokenize(tokenizer, [candidate.rendered for candidate in chunk])
        for candidate, tokens in zip(chunk, tokenized, strict=True):
            if len(tokens.ids) <= recipe.seq_len_tokens:
                yield _Row(candidate, tokens)
            else:
                found = f"{len(tokens.ids)} tokens, {recipe.seq_len_tokens} are allowed"
                tally.drop(RowProblem("too_long", found), candidate.conversation.file, candidate.conversation.row)
        report(Progress(what="prepare", done=tally.read, total=0, unit="rows"))


def _candidates(
    recipe: DataRecipe, seed: int, raw: DataSnapshot, template: ChatTemplate, tally: Tally
) -> Iterator[_Candidate]:
    seen: set[str] = set()
    for file in raw.rows:
        for number, value in read_rows(raw.path / file.name):
            tally.read += 1
            try:
                if isinstance(value, RowProblem):
                    raise value
                yield _candidate(recipe, seed, to_conversation(value, recipe.format, file.name, number), template, seen)
            except RowProblem as problem:
                tally.drop(problem, file.name, number)


def _candidate(
    recipe: DataRecipe, seed: int, conversation: Conversation, template: ChatTemplate, seen: set[str]
) -> _Candidate:
    function = conversation.function if recipe.split.by == "function" else None
    if recipe.tool_calls is not None:
        conversation = single_call(conversation, recipe.tool_calls.system_prompt)
    key = content_key(conversation)
    if key in seen:
        raise RowProblem("duplicate", "the same turns and tools came before")
    seen.add(key)
    evaluation = in_evaluation(function or key, seed, recipe.split.evaluation_fraction)
    return _Candidate(conversation, template.render(conversation), evaluation)


def _check(recipe: DataRecipe, tally: Tally, train_rows: int, evaluation_rows: int) -> None:
    if tally.bad > recipe.max_bad_rows * tally.read:
        raise DataError(
            f"{tally.bad} of {tally.read} rows cannot be used; data.max_bad_rows allows {recipe.max_bad_rows:.1%}. "
            f"Correct the rows below or raise it:\n{tally.table()}"
        )
    for side, rows in (("training", train_rows), ("evaluation", evaluation_rows)):
        if rows == 0:
            raise DataError(
                f"no row is left for {side}: {tally.read} were read, {sum(tally.dropped.values())} dropped, and "
                f"data.split.evaluation_fraction is {recipe.split.evaluation_fraction}; at least one row is needed on "
                f"each side, so add rows or change the fraction or the seed\n{tally.table()}"
            )


def _prompts(rows: list[_Row], template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> Iterator[PromptRow]:
    for row in rows:
        conversation = row.candidate.conversation
        prompt, expected = template.prompt(conversation, row.candidate.rendered)
        ids = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
        yield PromptRow(conversation.place, ids, prompt, expected, template.prompt_messages(conversation))


def _forgetting(recipe: DataRecipe, raw: DataSnapshot, tokenizer: PreTrainedTokenizerFast) -> list[TokenRow]:
    """Windows from the start of each text in turn, each opened as the tokenizer opens a text."""
    opening = tokenizer.encode("")
    window = min(FORGETTING_WINDOW_TOKENS, recipe.seq_len_tokens) - len(opening)
    rows: list[TokenRow] = []
    left = recipe.forgetting_tokens
    for file in raw.forgetting:
        text = read_text(raw.path / file.name, characters=left * 16)
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids[:left]
        left -= len(ids)
        for start in range(0, len(ids) - 1, window):
            window_ids = np.array(opening + ids[start : start + window], dtype=np.int32)
            rows.append(TokenRow(f"{file.name}:token {start}", window_ids, np.ones(len(window_ids), np.uint8)))
    return rows


def _record(
    recipe: DataRecipe,
    tokenizer: PreTrainedTokenizerFast,
    tally: Tally,
    train: list[_Row],
    evaluation: list[_Row],
    forgetting: list[TokenRow],
    into: Path,
) -> PreparedDataset:
    lengths = [len(row.tokens.ids) for row in train]
    return PreparedDataset(
        path=into,
        tokenizer_digest=tokenizer_digest(tokenizer),
        template_digest=template_digest(tokenizer),
        train_rows=len(train),
        evaluation_rows=len(evaluation),
        dropped=tally.dropped,
        train_tokens=sum(lengths),
        trained_tokens=sum(int(row.tokens.mask[1:].sum()) for row in train),
        evaluation_trained_tokens=sum(int(row.tokens.mask[1:].sum()) for row in evaluation),
        longest_row_tokens=max([*lengths, *(len(row.tokens.ids) for row in evaluation)]),
        forgetting_tokens=sum(len(row.input_ids) for row in forgetting),
        packing_efficiency=efficiency(lengths, recipe.seq_len_tokens),
    )


def _write_preview(path: Path, rows: list[_Row]) -> None:
    shown = [
        {
            "row_id": row.candidate.conversation.place,
            "segments": segments(row.candidate.rendered.text, row.tokens.trained),
        }
        for row in rows
    ]
    write_atomically(path, json.dumps(shown, ensure_ascii=False, indent=1))


def _write_summary(path: Path, record: PreparedDataset, tally: Tally, lengths: list[int]) -> None:
    facts = record.model_dump(mode="json", exclude={"path", "digest", "fingerprint", "dropped"})
    summary = {
        "read_rows": tally.read,
        **facts,
        "dropped": tally.as_json(),
        "lengths": histogram(lengths, record.longest_row_tokens),
    }
    write_atomically(path, json.dumps(summary, ensure_ascii=False, indent=1))


def _sentence(record: PreparedDataset) -> str:
    dropped = ", ".join(f"{rows} {code}" for code, rows in record.dropped.items()) or "none"
    return (
        f"{record.train_rows} training and {record.evaluation_rows} evaluation rows, {record.train_tokens} tokens "
        f"({record.trained_tokens} trained); dropped: {dropped}"
    )


__all__ = ["VERSION", "inspect", "prepare"]
