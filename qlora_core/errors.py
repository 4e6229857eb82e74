"""The tree of errors. Every message says what was received, what is allowed and what to do.

    QloraError
    ├── RecipeError             the recipe cannot be read or holds a value that is not allowed
    ├── SourceError             a model or data source does not exist or is not what was asked for
    │   └── SourceUnavailableError  it may exist, but could not be reached now; worth a retry
    ├── DataError               rows cannot be turned into training data
    ├── StoreError              the artifact store is damaged, locked or not writable
    ├── ChildError              a child process ended without a result
    ├── TrainingError           training cannot start or cannot go on
    ├── MergeError              an adapter cannot be merged, or the proof of the merge failed
    ├── EvaluationError         a model cannot be scored
    └── RegistryError           the model registry refused, or holds something unexpected
        ├── ChampionChangedError    another version became champion since the candidate was compared
        ├── NotRegisteredError      there is no model, alias or version of the name that was given
        └── RegistryUnavailableError  it could not be asked or written now; the same call may succeed later

A command that ends with one of them exits with its `exit_code`: 2 when the user's input must change, 1 otherwise.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

MACHINE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE})
"""Error numbers that say something about this machine, not about what was read."""
LONGEST_TEXT_CHARACTERS = 300


def shortened(text: str) -> str:
    """What was received, as a message shows it: no more than fits in a few lines."""
    return text if len(text) <= LONGEST_TEXT_CHARACTERS else text[:LONGEST_TEXT_CHARACTERS] + " …"


class QloraError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class RecipeError(QloraError):
    """The recipe cannot be read or holds a value that is not allowed."""

    exit_code = 2


class SourceError(QloraError):
    """A model or data source does not exist or is not what was asked for."""

    exit_code = 2


class SourceUnavailableError(SourceError):
    """A source could not be reached now; the same call may succeed later."""

    exit_code = 1


class DataError(QloraError):
    """Rows cannot be turned into training data."""

    exit_code = 2


class StoreError(QloraError):
    """The artifact store is damaged, locked or not writable."""


class ChildError(QloraError):
    """A child process ended without a result."""


class TrainingError(QloraError):
    """Training cannot start or cannot go on."""


class MergeError(QloraError):
    """An adapter cannot be merged, or the proof of the merge failed."""


class EvaluationError(QloraError):
    """A model cannot be scored."""


class RegistryError(QloraError):
    """The model registry refused, or holds something unexpected."""


class ChampionChangedError(RegistryError):
    """Another version became champion since the candidate was compared with the one before."""


class NotRegisteredError(RegistryError):
    """There is no model, alias or version of the name that was given."""

    exit_code = 2


class RegistryUnavailableError(RegistryError):
    """The registry could not be asked or written now; the same call may succeed later."""


ERRORS_BY_NAME: dict[str, type[QloraError]] = {
    kind.__name__: kind
    for kind in (
        QloraError,
        RecipeError,
        SourceError,
        SourceUnavailableError,
        DataError,
        StoreError,
        ChildError,
        TrainingError,
        MergeError,
        EvaluationError,
        RegistryError,
    )
}
"""How an error that a child process reports by name is raised again in its parent."""


@contextmanager
def refusing(kind: type[QloraError], what: str) -> Iterator[None]:
    """Refuse in words what comes from outside and cannot be read, whichever way a library fails over it.

    What says nothing about the thing itself passes: our own errors, those of the machine, those of a connection.

    Args:
        kind: of the refusal.
        what: begins its message, such as `the config.json of x`.
    """
    try:
        yield
    except (QloraError, MemoryError, ConnectionError, TimeoutError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in MACHINE:
            raise
        said = " ".join(str(error).split())
        said = shortened(said)
        raise kind(f"{what} cannot be read: {type(error).__name__}: {said}") from error
