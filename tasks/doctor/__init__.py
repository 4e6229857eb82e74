"""What `qlora doctor` looks at: this machine, both servers, and what a team's workers need of them.

Prefect and MLflow take seconds to import, so that they are only where a server of theirs is named.
"""

from collections.abc import Callable, Iterator

from tasks.doctor import databases, home, machine
from tasks.doctor.check import Check, failed, ok
from tasks.settings import Settings


def examine(settings: Settings) -> Iterator[Check]:
    """Every check, as it is made; one that breaks is a failure of its own and hides no other."""
    looks: tuple[tuple[str, Callable[[Settings], Iterator[Check]]], ...] = (
        ("versions", machine.versions),
        ("machine", machine.resources),
        ("GPU", machine.gpus),
        ("disk", machine.disk),
        ("home", home.examine),
        ("MLflow", _mlflow),
        ("Prefect", _prefect),
        ("databases", databases.examine),
    )
    for what, look in looks:
        try:
            yield from look(settings)
        except Exception as error:  # a doctor that dies of the illness is none
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            yield failed(what, f"this check could not be made: {said}", "report it with this line")


def _mlflow(settings: Settings) -> Iterator[Check]:
    if settings.embedded_mlflow:
        yield ok("MLflow", f"embedded, in {settings.root / 'mlflow'}")
        return
    from tasks.doctor import mlflow_server

    yield from mlflow_server.examine(settings)


def _prefect(settings: Settings) -> Iterator[Check]:
    if settings.embedded_prefect:
        yield ok("Prefect", f"embedded, in {settings.root / 'prefect'}; schedules need `qlora serve-flows` or a server")
        return
    from tasks.doctor import prefect_server

    yield from prefect_server.examine()
