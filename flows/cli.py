"""The `qlora` command. Every command imports what it needs when it runs, so that `--help` answers at once."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from flows.process import SHUTDOWN, explain_and_exit, start
from flows.terminal import prepare_process, show_version
from tasks.occasions import Occasion

app = typer.Typer(
    name="qlora",
    help="Scheduled QLoRA retraining: from a base model and your data to a verified model behind an alias.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="The data of a recipe.", no_args_is_help=True)
app.add_typer(data, name="data")
store = typer.Typer(help="The artifact store of this home.", no_args_is_help=True)
app.add_typer(store, name="store")

RecipePath = Annotated[Path, typer.Argument(help="A recipe, such as deployments/recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as train.lora.rank=8.")
]
ModelName = Annotated[str | None, typer.Argument(help="A registered model; all of them when left out.")]
ModelAtAlias = Annotated[str, typer.Argument(metavar="MODEL@ALIAS", help="Such as smollm2-tool-caller@champion.")]
ModelVersion = Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="An alias or a number, such as x@3.")]
Reason = Annotated[str, typer.Option(help="Why; kept with the version.")]
ExportKind = Annotated[
    Literal["nf4", "gptq-int4"], typer.Option("--as", help="What loads it: bitsandbytes, or GPTQ kernels.")
]
Cron = Annotated[
    str | None,
    typer.Option(help="When, as a cron line such as '0 2 * * *'; only when its data is published if left out."),
]
TimeZone = Annotated[str, typer.Option(help="Time zone of the cron line, such as Europe/Berlin.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]

ShowVersion = Annotated[
    bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and end.")
]


@app.callback()
def options(version: ShowVersion = False) -> None:
    """Scheduled QLoRA retraining: from a base model and your data to a verified model behind an alias."""


@app.command()
def run(
    recipe: RecipePath,
    set_: Overrides = None,
    force: Annotated[bool, typer.Option(help="Judge the candidate again even if nothing has changed.")] = False,
) -> None:
    """Retrain: download, prepare, train, merge, evaluate, register, promote."""
    settings = start(resumable=True)
    from flows.commands import run_recipe

    run_recipe(recipe, tuple(set_ or ()), force, settings)


@app.command()
def sweep(
    recipe: RecipePath,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B", help="Values to try, such as train.lora.rank=8,16.")
    ] = None,
    range_: Annotated[
        list[str] | None,
        typer.Option("--range", metavar="KEY=LOW..HIGH", help="Such as train.learning_rate=1e-5..1e-3."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many to try, as Optuna proposes; the whole grid when left out.")
    ] = None,
    set_: Overrides = None,
    force: Annotated[bool, typer.Option(help="Judge the best again even if nothing has changed.")] = False,
    on: Annotated[
        str | None, typer.Option(metavar="DEPLOYMENT", help="Whose workers run the trials, such as trial/gpu.")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="How many trials run at the same time there.")] = 1,
) -> None:
    """Train with several settings; the one of the lowest evaluation loss goes on to the gates."""
    settings = start(resumable=True)
    from flows.commands import sweep_recipe

    sweep_recipe(
        recipe, tuple(grid or ()), tuple(range_ or ()), trials, tuple(set_ or ()), force, on, at_once, settings
    )


@app.command()
def check(recipe: RecipePath, set_: Overrides = None) -> None:
    """Find out what would go wrong before compute is spent, and show three rows."""
    settings = start(resumable=True)
    from flows.commands import check_recipe

    check_recipe(recipe, tuple(set_ or ()), settings)


@app.command()
def models(name: ModelName = None, as_json: AsJson = False) -> None:
    """Show registered models: versions, aliases, verdicts, scores, lineage."""
    settings = start()
    from flows.show import show_models

    show_models(name, as_json, settings)


@app.command()
def compare(left: ModelVersion, right: ModelVersion, as_json: AsJson = False) -> None:
    """Show two versions side by side: their scores, and where their recipes differ."""
    settings = start()
    from flows.judging import show_comparison

    show_comparison(left, right, as_json, settings)


@app.command()
def lineage(version: ModelVersion, as_json: AsJson = False) -> None:
    """Show where a version comes from and what happened to it."""
    settings = start()
    from flows.judging import show_lineage

    show_lineage(version, as_json, settings)


@app.command()
def approve(
    version: ModelVersion,
    reject: Annotated[bool, typer.Option("--reject", help="Reject it; the champion stays.")] = False,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Approve or reject a version that waits for a person."""
    settings = start()
    from flows.judging import approve as answer

    answer(version, reject, reason, as_json, settings)


@app.command()
def promote(
    version: ModelVersion,
    reason: Reason = "",
    force: Annotated[bool, typer.Option("--force", help="Even if its gates or a person have refused it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a version the champion."""
    settings = start()
    from flows.judging import promote as make_champion

    make_champion(version, reason, force, as_json, settings)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="A registered model.")], reason: Reason = "", as_json: AsJson = False
) -> None:
    """Make the previous champion the champion again."""
    settings = start()
    from flows.judging import roll_back

    roll_back(name, reason, as_json, settings)


@app.command()
def copy(
    version: ModelVersion,
    to: Annotated[str, typer.Option(metavar="URI", help="The other MLflow server.")],
    as_json: AsJson = False,
) -> None:
    """Copy a version, with its files and lineage, to the registry of another MLflow server."""
    settings = start()
    from flows.judging import copy as copy_version

    copy_version(version, to, as_json, settings)


@app.command()
def delete(version: ModelVersion) -> None:
    """Take a version out of the registry; refused while an alias points at it."""
    settings = start()
    from flows.judging import delete as delete_version

    delete_version(version, settings)


@app.command()
def reconcile() -> None:
    """End what crashed runs left open, and finish promotions that were cut short."""
    settings = start(resumable=True)
    from flows.commands import reconcile_all

    reconcile_all(settings)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check versions, GPU, disk, both servers, the object store and workers, and say what to do."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"  # what does not work now is what is asked for
    settings = start()
    from flows.doctor import examine_all

    examine_all(as_json, settings)


@app.command()
def chat(
    model: ModelAtAlias,
    example: Annotated[
        bool, typer.Option(help="Start with a held-out row: its system prompt and its question.")
    ] = False,
) -> None:
    """Talk to a registered model; one line of input is one message."""
    settings = start()
    from flows.commands import chat_with

    chat_with(model, example, settings)


@app.command()
def serve(
    model: ModelAtAlias,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
) -> None:
    """Serve a registered model to OpenAI clients, with `transformers serve`."""
    settings = start()
    from flows.serve import serve_model

    serve_model(model, host, port, settings)


@app.command()
def export(model: ModelAtAlias, kind: ExportKind) -> None:
    """Export a registered model in 4 bits, and measure it against the model itself."""
    settings = start(resumable=True)
    from flows.commands import export_model

    export_model(model, kind, settings)


@app.command()
def ui(
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the MLflow UI.")] = 5000,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the Prefect UI.")] = 4200,
    browser: Annotated[bool, typer.Option(help="Open both pages.")] = True,
) -> None:
    """Serve the MLflow UI and the Prefect UI of the local stores until Ctrl-C."""
    settings = start()
    from flows.ui import serve

    serve(settings, mlflow_port, prefect_port, browser)


@app.command()
def deploy(
    recipe: RecipePath,
    cron: Cron = None,
    timezone: TimeZone = "UTC",
    pool: Annotated[str, typer.Option(help="The work pool whose workers retrain.")] = "gpu",
) -> None:
    """Deploy a recipe to the team's Prefect server: it retrains on a schedule and when its data is published."""
    settings = start()
    from flows.deploy import deploy as deploy_recipe

    deploy_recipe(recipe, cron, timezone, pool, settings)


@app.command()
def notify(
    block: Annotated[str, typer.Argument(metavar="TYPE/NAME", help="A block, such as slack-webhook/team.")],
    recipe: Annotated[Path | None, typer.Argument(help="The recipe to hear of; all recipes when left out.")] = None,
    on: Annotated[
        list[Occasion] | None, typer.Option(help="What to hear of; may be repeated; everything when left out.")
    ] = None,
) -> None:
    """Send failures and verdicts of retrainings to a notification block of the team's Prefect server."""
    settings = start()
    from flows.deploy import notify as listen

    listen(block, recipe, on or list(Occasion), settings)


@app.command("serve-flows")
def serve_flows(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes to retrain.")],
    cron: Cron = None,
    timezone: TimeZone = "UTC",
    prefect_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the Prefect server, where PREFECT_API_URL is not set.")
    ] = 4200,
) -> None:
    """Run the schedules of recipes on this machine until Ctrl-C; no worker is needed."""
    settings = start()
    from flows.deploy import serve_flows as serve_recipes

    signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio puts its own there, and ends in order
    serve_recipes(recipes, cron, timezone, prefect_port, settings)


@data.command()
def publish(recipe: RecipePath) -> None:
    """Tell the team's Prefect server that a recipe's data may have changed: what is deployed for it retrains."""
    settings = start()
    from flows.commands import publish_data

    publish_data(recipe, settings)


@store.command("ls")
def store_ls(as_json: AsJson = False) -> None:
    """List what is stored: sizes, last use, and who needs it."""
    settings = start()
    from flows.store import show_store

    show_store(as_json, settings)


@store.command("verify")
def store_verify() -> None:
    """Hash every file again and name what is missing, altered or does not belong there."""
    settings = start()
    from flows.store import verify_store

    verify_store(settings)


@store.command("gc")
def store_gc(
    unused_days: Annotated[float, typer.Option(min=0, help="How many days ago the last use must be.")] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove what was not used for long and is not needed by an alias, a live run or a recent run."""
    settings = start()
    from flows.store import collect_garbage

    collect_garbage(unused_days, dry_run, settings)


def main() -> NoReturn:
    """Entry point: an expected error is one message and an exit code, never a traceback; a signal is its own code."""
    SHUTDOWN.listen()
    try:
        prepare_process()
        app(standalone_mode=True)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        SHUTDOWN.over = SHUTDOWN.resumable
        _end(error)
    sys.exit(0)


def _end(error: BaseException) -> NoReturn:
    if SHUTDOWN.number is not None and SHUTDOWN.resumable:
        SHUTDOWN.explain()
        sys.exit(SHUTDOWN.exit_code)
    if isinstance(error, Exception):
        explain_and_exit(error)
    raise error


if __name__ == "__main__":
    main()
