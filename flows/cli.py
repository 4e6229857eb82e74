"""The `qlora` command. Every command imports what it needs when it runs, so that `--help` answers at once."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="qlora",
    help="Scheduled QLoRA retraining: from a base model and your data to a verified model behind an alias.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(help="A recipe, such as deployments/recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as train.lora.rank=8.")
]
ModelName = Annotated[str | None, typer.Argument(help="A registered model; all of them when left out.")]
ModelAtAlias = Annotated[str, typer.Argument(metavar="MODEL@ALIAS", help="Such as smollm2-tool-caller@champion.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


@app.command()
def run(
    recipe: RecipePath,
    set_: Overrides = None,
    force: Annotated[bool, typer.Option(help="Judge the candidate again even if nothing has changed.")] = False,
) -> None:
    """Retrain: download, prepare, train, merge, evaluate, register, promote."""
    settings = _start()
    from flows.commands import run_recipe

    run_recipe(recipe, tuple(set_ or ()), force, settings)


@app.command()
def check(recipe: RecipePath, set_: Overrides = None) -> None:
    """Find out what would go wrong before compute is spent, and look at three rows."""
    settings = _start()
    from flows.commands import check_recipe

    check_recipe(recipe, tuple(set_ or ()), settings)


@app.command()
def models(name: ModelName = None, as_json: AsJson = False) -> None:
    """Show registered models: versions, aliases, verdicts, scores, lineage."""
    settings = _start()
    from flows.show import show_models

    show_models(name, as_json, settings)


@app.command()
def rollback(name: Annotated[str, typer.Argument(help="A registered model.")]) -> None:
    """Make the previous champion the champion again."""
    settings = _start()
    from flows.commands import roll_back

    roll_back(name, settings)


@app.command()
def chat(
    model: ModelAtAlias,
    example: Annotated[
        bool, typer.Option(help="Start with a held-out row: its system prompt and its question.")
    ] = False,
) -> None:
    """Talk to a registered model; one line of input is one message."""
    settings = _start()
    from flows.commands import chat_with

    chat_with(model, example, settings)


@app.command()
def ui(
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow UI.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect UI.")] = 4200,
    browser: Annotated[bool, typer.Option(help="Open both pages.")] = True,
) -> None:
    """Serve the MLflow UI and the Prefect UI of the local stores until Ctrl-C."""
    settings = _start()
    from flows.ui import serve

    serve(settings, mlflow_port, prefect_port, browser)


def main() -> NoReturn:
    """Entry point: an expected error is one message and an exit code, never a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(standalone_mode=True)
    except Exception as error:
        _explain(error)
    sys.exit(0)


def _explain(error: Exception) -> NoReturn:
    from qlora_core.errors import QloraError

    if not isinstance(error, QloraError):
        raise error
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    sys.exit(error.exit_code)


def _start():  # type: ignore[no-untyped-def]
    """Settings for this command, with Prefect and MLflow pointed at them before they are imported."""
    from tasks.settings import Settings

    settings = Settings()
    settings.configure_libraries()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return settings


def _terminate(number: int, _: object) -> NoReturn:
    """Let `finally` blocks run: children are ended and MLflow runs get their status."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
