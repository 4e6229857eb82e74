"""Searches of MLflow, which answers in pages: whoever reads only the first one misses what is on the others."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

PAGE = 1000
"""Runs, experiments, models or versions in one answer."""


def in_pages(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    """Everything that a search of MLflow finds; `ask` gives the page that begins at a token."""
    token: str | None = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


def search_runs(
    client: MlflowClient, experiments: list[str], filter_string: str, limit: int | None = None, order: str = "DESC"
) -> list[Run]:
    """Active runs of some experiments by their start, `DESC` or `ASC`; all of them, or the first `limit`."""
    size = PAGE if limit is None else min(limit, PAGE)
    found: Iterator[Run] = in_pages(
        lambda token: client.search_runs(
            experiments, filter_string, ViewType.ACTIVE_ONLY, size, [f"attributes.start_time {order}"], token
        )
    )
    return list(islice(found, limit))


def having(tags: Mapping[str, str]) -> str:
    """The filter that finds runs with these tags."""
    return " AND ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
