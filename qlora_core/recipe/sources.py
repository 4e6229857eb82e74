"""Where models and data come from."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from qlora_core.recipe.part import Part, Sha256

COMMIT = re.compile(r"^[0-9a-f]{40}$")


def _unpinned(what: str) -> PydanticCustomError:
    return PydanticCustomError(
        "unpinned_code",
        "`trust_remote_code` runs what the model brings along; pin `revision` to {what}",
        {"what": what},
    )


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
    revision: Sha256 | None = None
    """What the content must be ; `null` takes whatever is there."""
    trust_remote_code: bool = False
    """For models: take the folder's Python files along and let transformers run them; `revision` has to be pinned."""

    @model_validator(mode="after")
    def _code_is_pinned(self) -> Self:
        if self.trust_remote_code and self.revision is None:
            raise _unpinned("the SHA-256 of the content: 64 zeros make the refusal say it")
        return self


class HubSource(Part):
    """A repository of Hugging Face or ModelScope; the revision is resolved to a commit before anything is fetched."""

    source: Literal["huggingface", "modelscope"]
    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
    revision: str | None = None
    """A branch, tag or commit; `null` is the hub's default branch."""
    file: str | None = None
    """For data: the one file to read; `null` takes every data file of the repository."""
    trust_remote_code: bool = False
    """For models: fetch the repository's Python files and let transformers run them; `revision` must be a commit."""
    alternatives: tuple["HubSource", ...] = ()
    """The same thing in other places, tried in this order when this one is not there or cannot be reached."""

    @model_validator(mode="after")
    def _code_is_pinned(self) -> Self:
        if self.trust_remote_code and not COMMIT.match(self.revision or ""):
            raise _unpinned("a commit of 40 hex digits, not a branch")
        return self


Source = Annotated[PackageSource | LocalSource | HubSource, Field(discriminator="source")]
