"""The front door of data preparation: raw files to token ids and loss masks, split into training and evaluation.

    read -> conversation -> (one call) -> rendered text and spans -> ids and mask -> train or evaluation

Every row that does not arrive is counted with the reason, see `reasons.py`.
"""

import gc
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_core.artifacts import DataSnapshot, ModelSnapshot, PreparedDataset
from qlora_core.data.candidates import Candidates
from qlora_core.data.near import sift
from qlora_core.data.output import Output
from qlora_core.data.page import render_page
from qlora_core.data.pipeline import finish
from qlora_core.data.read import inspect, read_text
from qlora_core.data.reuse import Earlier, comparable
from qlora_core.data.shorten import Shortener
from qlora_core.data.summary import Tally, counts_as_json, files_as_json, histogram
from qlora_core.data.template import ChatTemplate
from qlora_core.data.tokenize import RowTokenizer, UnequalIdsError, segments
from qlora_core.errors import DataError
from qlora_core.events import Note, Progress, Report
from qlora_core.modeling.packing import efficiency
from qlora_core.modeling.rows import TokenRow, write_token_rows
from qlora_core.modeling.tokenizer import load_tokenizer, template_digest, tokenizer_digest
from qlora_core.recipe import DataRecipe
from qlora_core.store import sha256_of_json, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 2
REPORT_EVERY_S = 1.0
FORGETTING_WINDOW_TOKENS = 512


def prepare(
    recipe: DataRecipe,
    seed: int,
    base: ModelSnapshot,
    raw: DataSnapshot,
    into: Path,
    report: Report,
    earlier: Iterable[PreparedDataset] = (),
) -> PreparedDataset:
    """Write the files that `modeling/rows.py` describes, with summary.json, preview.json and page.html, into `into`.

    Args:
        recipe: what to do with the rows.
        seed: decides, with each row's key, its side of the split.
        base: the model whose tokenizer and chat template are used.
        raw: the files to read.
        into: an empty directory.
        report: hears how many rows were read.
        earlier: data sets; of the first that was made in the same way, no row is tokenized again.

    Raises:
        DataError: too many rows are unreadable, one side of the split is empty, the chat template cannot be used, or
            rows may become longer than the model can read.
    """
    recipe = _within_context(recipe, base, report)
    tokenizer = load_tokenizer(base.path)
    digests = tokenizer_digest(tokenizer), template_digest(tokenizer)
    way = sha256_of_json([VERSION, *digests, recipe.loss])
    make = partial(_make, recipe, seed, tokenizer, raw, into, report, way, comparable(earlier, way))
    try:
        with _imports_uncollected(), RowTokenizer(tokenizer) as tokenize:
            tally, output = make(tokenize)
    except UnequalIdsError:
        report(Note(message="the fast tokenizer gave other ids than the model's own for a row; preparing without it"))
        tally, output = make(RowTokenizer(tokenizer, fast=False))
    _check(recipe, tally, len(output.train.lengths), len(output.evaluation.lengths))
    forgetting_tokens = _write_forgetting(recipe, raw, tokenizer, into / "forgetting.arrow")
    record = PreparedDataset(
        path=into,
        tokenizer_digest=digests[0],
        template_digest=digests[1],
        train_rows=len(output.train.lengths),
        evaluation_rows=len(output.evaluation.lengths),
        dropped=tally.dropped,
        noticed=tally.noticed,
        train_tokens=sum(output.train.lengths),
        trained_tokens=output.train.trained_tokens,
        evaluation_trained_tokens=output.evaluation.trained_tokens,
        longest_row_tokens=max(max(output.train.lengths), max(output.evaluation.lengths)),
        forgetting_tokens=forgetting_tokens,
        packing_efficiency=efficiency(output.train.lengths, recipe.seq_len_tokens),
        reused_rows=output.reused_rows,
    )
    sources = {file.name: file.source for file in (*raw.evaluation, *raw.rows)}
    _describe(into, record, recipe, sources, tally, output, tokenizer)
    report(Note(message=_sentence(record)))
    return record


@contextmanager
def _imports_uncollected() -> Iterator[None]:
    """Each row makes tuples, whose number makes Python's collector walk through all that was ever imported: a third of
    the time of a large data set.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _make(
    recipe: DataRecipe,
    seed: int,
    tokenizer: "PreTrainedTokenizerFast",
    raw: DataSnapshot,
    into: Path,
    report: Report,
    way: str,
    earlier: Path | None,
    tokenize: RowTokenizer,
) -> tuple[Tally, Output]:
    """Write the rows; return what was counted."""
    tally = Tally()
    template = ChatTemplate(tokenizer)
    candidates = Candidates(recipe, seed, template, Earlier(earlier), tally)
    shortener = Shortener(template, tokenize, recipe.loss, recipe.too_long, recipe.seq_len_tokens)
    told = time.monotonic()
    with Output(into, recipe.seq_len_tokens, way, tally) as output:
        for rows in finish(sift(candidates.of(raw), recipe.near_duplicates, tally), tokenize, shortener):
            output.write(rows)
            if time.monotonic() - told > REPORT_EVERY_S:
                report(Progress(what="prepare", done=tally.read, total=0, unit="rows"))
                told = time.monotonic()
    return tally, output


def _within_context(recipe: DataRecipe, base: ModelSnapshot, report: Report) -> DataRecipe:
    """The recipe with rows that the model can read: a length that nobody has set is lowered, and said.

    Raises:
        DataError: the length was set, and is longer.
    """
    context = base.architecture.context_tokens
    if context is None or recipe.seq_len_tokens <= context:
        return recipe
    why = f"{base.source} reads at most {context:,} tokens (max_position_embeddings, times its rope scaling)"
    if "seq_len_tokens" in recipe.model_fields_set:
        raise DataError(
            f"data.seq_len_tokens is {recipe.seq_len_tokens:,}, and {why}; set it to {context} or less. What happens "
            "to longer rows, data.too_long says"
        )
    report(Note(message=f"rows are at most {context:,} tokens long, as {why}; data.seq_len_tokens is not set"))
    return recipe.model_copy(update={"seq_len_tokens": context})


def _check(recipe: DataRecipe, tally: Tally, train_rows: int, evaluation_rows: int) -> None:
    if tally.bad > recipe.max_bad_rows * tally.read:
        raise DataError(
            f"{tally.bad} of {tally.read} rows cannot be used; data.max_bad_rows allows {recipe.max_bad_rows:.1%}. "
            f"Correct the rows below or raise it:\n{tally.table()}"
        )
    if recipe.too_long == "fail" and "too_long" in tally.drops:
        raise DataError(
            f"{tally.drops['too_long'].rows} rows are longer than data.seq_len_tokens, {recipe.seq_len_tokens}, and "
            f"data.too_long is `fail`; raise the length, or choose drop, truncate or split\n{tally.table()}"
        )
    for side, rows in (("training", train_rows), ("evaluation", evaluation_rows)):
        if rows == 0:
            raise DataError(
                f"no row is left for {side}: {tally.read} were read, {sum(tally.dropped.values())} dropped, and "
                f"data.split.evaluation_fraction is {recipe.split.evaluation_fraction}; at least one row is needed on "
                f"each side, so add rows or change the fraction or the seed\n{tally.table()}"
            )


def _write_forgetting(recipe: DataRecipe, raw: DataSnapshot, tokenizer: "PreTrainedTokenizerFast", path: Path) -> int:
    """Write windows from the start of each text in turn, each opened as the tokenizer opens a text; return tokens."""
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
    write_token_rows(path, rows)
    return sum(len(row.input_ids) for row in rows)


def _describe(
    into: Path,
    record: PreparedDataset,
    recipe: DataRecipe,
    sources: Mapping[str, str],
    tally: Tally,
    output: Output,
    tokenizer: "PreTrainedTokenizerFast",
) -> None:
    """Write summary.json, preview.json and page.html, for people."""
    facts = record.model_dump(
        mode="json", exclude={"path", "digest", "fingerprint", "dropped", "noticed", "reused_rows"}
    )
    summary = {
        "read_rows": tally.read,
        "seq_len_tokens": recipe.seq_len_tokens,
        **facts,
        "files": files_as_json(tally, sources),
        "dropped": counts_as_json(tally.drops),
        "noticed": counts_as_json(tally.notices),
        "lengths": histogram(output.train.lengths + output.evaluation.lengths, record.longest_row_tokens),
    }
    shown = [{"row_id": name, "segments": segments(tokenizer, tokens)} for name, tokens in output.preview]
    write_atomically(into / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1))
    write_atomically(into / "preview.json", json.dumps(shown, ensure_ascii=False, indent=1))
    write_atomically(into / "page.html", render_page(summary, shown))


def _sentence(record: PreparedDataset) -> str:
    dropped = ", ".join(f"{rows} {code}" for code, rows in record.dropped.items()) or "none"
    return (
        f"{record.train_rows} training and {record.evaluation_rows} evaluation rows, {record.train_tokens} tokens "
        f"({record.trained_tokens} trained); dropped: {dropped}"
    )


__all__ = ["VERSION", "inspect", "prepare"]
