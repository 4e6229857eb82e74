"""Tokenize in background threads while the next rows are read and rendered.

The tokenizer works outside Python's global lock on all cores, so reading, checking and writing cost little time
beside it. Memory holds a few chunks, however many rows there are.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from qlora_core.data.candidates import Candidate
from qlora_core.data.output import Finished
from qlora_core.data.shorten import Shortener
from qlora_core.data.template import Rendered
from qlora_core.data.tokenize import RowTokenizer, Tokens

CHUNK_ROWS = 2048
WORKERS = 2
"""While one thread tokenizes, the other makes arrays of what came out."""
CHUNKS_AHEAD = 3


def finish(candidates: Iterable[Candidate], tokenizer: RowTokenizer, shortener: Shortener) -> Iterator[list[Finished]]:
    """Tokenize candidates, chunk by chunk, in their order."""
    source = iter(candidates)
    waiting: deque[Future[list[Finished]]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        while chunk := list(islice(source, CHUNK_ROWS)):
            waiting.append(pool.submit(_finish, chunk, tokenizer, shortener))
            if len(waiting) >= CHUNKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _finish(chunk: Sequence[Candidate], tokenizer: RowTokenizer, shortener: Shortener) -> list[Finished]:
    new = [candidate for candidate in chunk if candidate.known is None]
    questions = [Rendered(candidate.prompt.prompt, ()) for candidate in new if candidate.prompt]
    made = iter(tokenizer([*(candidate.rendered for candidate in new), *questions]))
    tokens = {candidate.row_id: next(made) for candidate in new}
    asked = {candidate.row_id: next(made) for candidate in new if candidate.prompt}
    whole = (_finished(candidate, tokens.get(candidate.row_id), asked.get(candidate.row_id)) for candidate in chunk)
    return [part for row, candidate in zip(whole, chunk, strict=True) for part in _fitting(row, candidate, shortener)]


def _fitting(row: Finished, candidate: Candidate, shortener: Shortener) -> Iterator[Finished]:
    """The row, or what is kept of it where it is too long; if nothing is, the row itself, to be counted."""
    parts = shortener.parts(candidate.conversation) if len(row.tokens.ids) > shortener.limit else []
    if not parts:
        yield row
        return
    kept = sum(len(part.conversation.messages) for part in parts)
    cut = f"{len(row.tokens.ids)} tokens, {shortener.limit} are allowed; {kept} turns in {len(parts)} rows are kept"
    for number, part in enumerate(parts, 1):
        made = row._replace(tokens=part.tokens, reused=False, cut=cut, part=number if len(parts) > 1 else 0)
        prompt = shortener.prompt(part)._replace(row_id=made.row_id) if row.evaluation else None
        yield made._replace(prompt=prompt)


def _finished(candidate: Candidate, tokens: Tokens | None, asked: Tokens | None) -> Finished:
    place, copies = (candidate.file, candidate.row, candidate.key, candidate.evaluation), candidate.copies
    if candidate.known is not None:
        prompt = candidate.known.prompt
        named = prompt._replace(row_id=candidate.row_id) if prompt else None
        return Finished(*place, candidate.known.tokens, named, reused=True, copies=copies)
    assert tokens is not None
    prompt = candidate.prompt._replace(prompt_ids=asked.ids.tolist()) if candidate.prompt and asked else None
    return Finished(*place, tokens, prompt, reused=False, copies=copies)
