"""Fill MLflow's database with years of retrainings, by COPY: the rows of one real one, again and again."""

from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid5

import psycopg

BIG_MODEL_VERSIONS = 1_000
RUNS_A_VERSION = 5
"""The parent, train, merge, evaluate, register; an unchanged base and unchanged rows have none."""
POINTS_A_VERSION = 100
VERSIONS_A_MODEL = 18
HOUR_MS = 3_600_000
SPACE = UUID("00000000-0000-0000-0000-0000000005ca")


def fill(database: str, name: str, versions: int) -> None:
    """Copy the retraining behind version 1 of a model `versions - 1` times.

    Args:
        database: URL of MLflow's database, as a superuser.
        name: the model that one was made of; it gets up to 1,000 versions, others of the same shape 18 each.
        versions: how many there should be in the end.
    """
    with psycopg.connect(database) as connection:
        template = Template(connection, name)
        plan = list(_plan(name, versions))
        for model in dict.fromkeys(model for model, _ in plan if model != name):
            template.add_model(model)
        for table in template.tables:
            template.copy(table, plan)
        connection.execute("SELECT setval(pg_get_serial_sequence('experiments', 'experiment_id'), 100000)")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ANALYZE")


def _plan(name: str, versions: int) -> Iterator[tuple[str, int]]:
    """Model and number of every version that is to be added."""
    big = min(BIG_MODEL_VERSIONS, versions)
    yield from ((name, number) for number in range(2, big + 1))
    yield from ((f"{name}-{at // VERSIONS_A_MODEL:04}", at % VERSIONS_A_MODEL + 1) for at in range(versions - big))


class Template:
    """The rows of one real retraining, and how they look for another model and version."""

    tables = ("runs", "tags", "params", "metrics", "latest_metrics", "model_versions", "model_version_tags")

    def __init__(self, connection: psycopg.Connection[Any], name: str) -> None:
        self._connection, self._name = connection, name
        (run_id,) = self._one("SELECT run_id FROM model_versions WHERE name = %s AND version = 1", name)
        (parent,) = self._one("SELECT value FROM tags WHERE run_uuid = %s AND key = 'mlflow.parentRunId'", run_id)
        children = self._all(
            "SELECT t.run_uuid FROM tags t JOIN tags s USING (run_uuid) WHERE t.key = 'mlflow.parentRunId' "
            "AND t.value = %s AND s.key = 'qlora.stage' AND s.value IN ('train', 'merge', 'evaluate', 'register')",
            parent,
        )
        self.runs = [parent, *(run for (run,) in children)]
        assert len(self.runs) == RUNS_A_VERSION, self.runs
        (self.experiment,) = self._one("SELECT experiment_id FROM runs WHERE run_uuid = %s", parent)
        self.experiments = {name: self.experiment}
        self.rows = {table: self._rows(table) for table in self.tables}
        self.columns = {table: self._columns(table) for table in self.tables}

    def add_model(self, model: str) -> None:
        """A registered model, its experiment, and its aliases: the newest version but one is the champion."""
        experiment = self.experiment + 1000 + len(self.experiments)
        self.experiments[model] = experiment
        run = self._connection.execute
        run(
            "INSERT INTO experiments SELECT (jsonb_populate_record(e, jsonb_build_object('experiment_id', %s::int, "
            "'name', %s::text))).* FROM experiments e WHERE experiment_id = %s",
            (experiment, model, self.experiment),
        )
        for table in ("registered_models", "registered_model_tags", "registered_model_aliases"):
            run(
                f"INSERT INTO {table} SELECT (jsonb_populate_record(t, jsonb_build_object('name', %s::text))).* "
                f"FROM {table} t WHERE name = %s",
                (model, self._name),
            )

    def copy(self, table: str, plan: list[tuple[str, int]]) -> None:
        """Add the rows of every planned version to one table; the versions' foreign keys are checked as always."""
        columns = self.columns[table]
        with self._connection.cursor() as cursor, cursor.copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN") as out:
            for model, number in plan:
                for row in self.rows[table]:
                    out.write_row(self._altered(dict(zip(columns, row, strict=True)), table, model, number))

    def _altered(self, row: dict[str, Any], table: str, model: str, number: int) -> list[Any]:
        for column in ("run_uuid", "run_id"):
            if row.get(column) in self.runs:
                row[column] = self._run_id(row[column], model, number)
        if row.get("value") in self.runs:
            row["value"] = self._run_id(row["value"], model, number)
        if table == "runs":
            row |= {"experiment_id": self.experiments[model]}
            row |= {time: row[time] - number * HOUR_MS for time in ("start_time", "end_time")}
        if table.startswith("model_version"):
            row |= {"name": model, "version": number}
        if table == "model_version_tags" and row["key"] in ("qlora.key", "qlora.model_digest"):
            row["value"] = uuid5(SPACE, f"{row['key']} {model} {number}").hex * 2
        return list(row.values())

    def _run_id(self, run: str, model: str, number: int) -> str:
        return uuid5(SPACE, f"{run} {model} {number}").hex

    def _rows(self, table: str) -> list[tuple[Any, ...]]:
        """Of metrics, as many points as a version should have: the steps of the real training, continued."""
        if table.startswith("model_version"):
            return self._all(f"SELECT {', '.join(self._columns(table))} FROM {table} WHERE name = %s", self._name)
        rows = self._all(f"SELECT {', '.join(self._columns(table))} FROM {table} WHERE run_uuid = ANY(%s)", self.runs)
        if table != "metrics":
            return rows
        columns = self._columns(table)
        step, kept = columns.index("step"), []
        while len(kept) < POINTS_A_VERSION:
            shift = 1000 * (len(kept) // len(rows))
            kept += [(*row[:step], row[step] + shift, *row[step + 1 :]) for row in rows]
        return kept[:POINTS_A_VERSION]

    def _columns(self, table: str) -> list[str]:
        found = self._all(
            "SELECT column_name FROM information_schema.columns WHERE table_name = %s AND table_schema = 'public' "
            "ORDER BY ordinal_position",
            table,
        )
        return [column for (column,) in found]

    def _one(self, query: str, *values: Any) -> tuple[Any, ...]:
        (row,) = self._all(query, *values)
        return row

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return list(self._connection.execute(query, values).fetchall())
