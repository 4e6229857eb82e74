"""Find the unquantized model that a quantized one was made from: adapters are merged into that one.

The recipe's `merge_base` decides where it is given. Else the model's own card is asked, then the habits of those who
publish quantized models: the same name without its ending, from the same owner or from the family's own.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import metadata_load

from qlora_core.artifacts import ModelSnapshot
from qlora_core.errors import SourceError, SourceUnavailableError
from qlora_core.hub.resolved import Resolved
from qlora_core.recipe import HubSource, LocalSource, Source

ENDING = re.compile(
    r"([-_.](unsloth|quantized|gptq|awq|bnb|nf4|fp4|int[48]|w[48]a16|[48]-?bits?|\d+g|g\d+|actorder))+$", re.IGNORECASE
)
"""What is added to a name when a model is quantized: `-GPTQ-Int4`, `-Int4`, `-unsloth-bnb-4bit`, `-quantized.w4a16`."""

OWNERS = {
    "qwen": "Qwen",
    "llama-2": "meta-llama",
    "llama-3": "meta-llama",
    "meta-llama": "meta-llama",
    "mistral": "mistralai",
    "mixtral": "mistralai",
    "smollm": "HuggingFaceTB",
}
"""How the names of a family begin, to who publishes its unquantized models."""

REPO = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


def candidates(base: Resolved, snapshot: ModelSnapshot) -> list[Source]:
    """Where the twin may be, best guess first.

    Args:
        base: the quantized model, as resolved.
        snapshot: the same on disk; its card is read.
    """
    found: list[Source] = []
    for source in (*_named_by_card(base.source, snapshot.path), *_named_alike(base.source)):
        if source not in found and source != base.source:
            found.append(source)
    return found


def explain_no_twin(base: Resolved, tried: list[tuple[Source, SourceError]]) -> SourceError:
    """What to tell when no candidate is there."""
    reasons = "".join(f"\n  {_name(source)}: {problem}" for source, problem in tried)
    kind = SourceUnavailableError if any(isinstance(p, SourceUnavailableError) for _, p in tried) else SourceError
    return kind(
        f"{base.description} is quantized, and its unquantized twin, into which adapters are merged, was not found; "
        f"set `merge_base` to it, such as `merge_base: {{source: huggingface, repo: owner/name}}`. Tried:"
        f"{reasons or ' nothing, as neither its card nor its name says what it was made from'}"
    )


def _named_by_card(source: Source, folder: Path) -> Iterator[Source]:
    """`base_model` in the front matter of the model card, on the hub that the model came from."""
    card = folder / "README.md"
    if not card.is_file():
        return
    named = (_metadata(card) or {}).get("base_model")
    hub = source.source if isinstance(source, HubSource) else "huggingface"
    for repo in named if isinstance(named, list) else [named]:
        if isinstance(repo, str) and REPO.match(repo):
            yield HubSource(source=hub, repo=repo)


def _metadata(card: Path) -> dict[str, object] | None:
    try:
        return metadata_load(card)
    except ValueError:
        return None


def _named_alike(source: Source) -> Iterator[Source]:
    if isinstance(source, LocalSource):
        folder = source.path.with_name(ENDING.sub("", source.path.name))
        if folder != source.path and folder.is_dir():
            yield LocalSource(source="local", path=folder)
    if isinstance(source, HubSource):
        owner, _, name = source.repo.partition("/")
        plain = ENDING.sub("", name)
        if plain == name:
            return
        yield HubSource(source=source.source, repo=f"{owner}/{plain}")
        for beginning, publisher in OWNERS.items():
            if plain.lower().startswith(beginning):
                yield HubSource(source=source.source, repo=f"{publisher}/{plain}")


def _name(source: Source) -> str:
    return f"{source.source} {source.repo}" if isinstance(source, HubSource) else str(getattr(source, "path", source))
