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
        └── RegistryUnavailableError  it could not be asked or written now; the same call may succeed later

A command that ends with one of them exits with its `exit_code`: 2 when the user's input must change, 1 otherwise.
"""


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
