"""What the commands do, after their arguments are read."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from qlora_core.merging.export import Kind
from qlora_core.recipe import Recipe, load_recipe
from qlora_core.sweep import parse_space
from tasks.settings import Settings

console = Console(highlight=False, soft_wrap=True)


def run_recipe(path: Path, overrides: tuple[str, ...], force: bool, settings: Settings) -> None:
    """Check, then retrain; ends at once when nothing has changed."""
    from flows.show import show_edits
    from tasks.preflight import preflight
    from tasks.registry import ModelRegistry
    from tasks.unchanged import settled

    recipe = load_recipe(path, overrides)
    preflight(recipe, settings)
    if not force and (version := settled(recipe, settings)):
        _end_orphans_of_team(settings)
        console.print(
            f"Nothing has changed: version {version.number} of {recipe.name} was made from this recipe and this data, "
            f"and was {version.verdict} ({version.why})."
        )
        show_edits(ModelRegistry(settings), recipe.name)
        console.print("Retrain all the same with [bold]--force[/], or look at it with [bold]qlora models[/].")
        return
    _retrain(recipe, force, settings)


def _end_orphans_of_team(settings: Settings) -> None:
    """Where there is no server yet, starting one would take longer than everything else."""
    if not settings.embedded_prefect:
        from tasks.orphans import end_orphans
        from tasks.tracking import Tracker

        end_orphans(Tracker(settings))


def _retrain(recipe: Recipe, force: bool, settings: Settings) -> None:
    is_new = not settings.mlflow_server and not (settings.root / "mlflow" / "mlflow.db").is_file()
    settings.make_home()
    from flows.retrain import retrain
    from flows.show import show_edits, show_outcome
    from tasks.orphans import born_here
    from tasks.registry import ModelRegistry

    if not is_new:  # a promotion writes down other aliases, and then nothing tells what was meant
        show_edits(ModelRegistry(settings), recipe.name)

    _have_prefect(settings)
    with born_here():
        outcome = retrain(recipe, force)
    if outcome is not None:
        show_outcome(outcome, settings)


def _have_prefect(settings: Settings) -> None:
    if settings.embedded_prefect:
        from tasks.embedded import start_embedded_server

        console.print("[dim]starting the embedded Prefect server …[/]")
        start_embedded_server(settings)


def sweep_recipe(
    path: Path,
    grid: tuple[str, ...],
    ranges: tuple[str, ...],
    trials: int | None,
    overrides: tuple[str, ...],
    force: bool,
    on: str | None,
    at_once: int,
    settings: Settings,
) -> None:
    """Try several recipes; the best goes on to the gates."""
    from tasks.preflight import preflight
    from tasks.sweeping import refuse_incomparable

    recipe = load_recipe(path, overrides)
    space = parse_space(grid, ranges, recipe, trials is not None)
    refuse_incomparable(space, lambda varied: load_recipe(path, (*overrides, *varied)))
    preflight(recipe, settings)
    settings.make_home()
    from flows.show import show_sweep
    from flows.sweep import sweep
    from tasks.orphans import born_here

    _have_prefect(settings)
    with born_here():
        swept = sweep(path.resolve(), grid, ranges, trials, overrides, force, on, at_once)
    show_sweep(swept, settings)


def reconcile_all(settings: Settings) -> None:
    """End what crashed runs left open, and say what was done."""
    settings.make_home()
    from flows.reconcile import reconcile
    from tasks.orphans import born_here

    _have_prefect(settings)
    with born_here():
        done = reconcile()
    for line in done or ["nothing to do"]:
        console.print(line)


def publish_data(path: Path, settings: Settings) -> None:
    """Emit the event that the recipe's data may have changed."""
    from tasks.publishing import publish

    recipe = load_recipe(path)
    revision = publish(recipe, settings)
    console.print(f"published: the data of {recipe.name} is now {revision[:12]}; what is deployed for it retrains")


def export_model(model: str, kind: Kind, settings: Settings) -> None:
    """Export the version behind an alias and say where it is."""
    settings.make_home()
    from flows.export import export
    from tasks.orphans import born_here

    _have_prefect(settings)
    with born_here():
        exported = export(model, kind)
    console.print(f"\nfolder    {exported.path / 'model'}")


def check_recipe(path: Path, overrides: tuple[str, ...], settings: Settings) -> None:
    """Everything that can be known before training: sources, disk, rows, memory."""
    from flows.show import show_check
    from qlora_core.events import Metrics, Note, Progress
    from tasks.disk import disks_of
    from tasks.preflight import preflight, prepared

    recipe = load_recipe(path, overrides)
    preflight(recipe, settings)
    with console.status("fetching and preparing …") as status:

        def report(event: Metrics | Progress | Note) -> None:
            if isinstance(event, Progress):
                status.update(f"{event.what}: {event.done:,} of {event.total:,} {event.unit}")

        base, dataset = prepared(recipe, settings, report)
    show_check(recipe, base, dataset, [disk.sentence for disk in disks_of(recipe, settings)])


def chat_with(model: str, example: bool, settings: Settings) -> None:
    """A conversation on the terminal with the version behind an alias."""
    from tasks.chatting import open_chat

    chat = open_chat(model, example, settings)
    console.print(f"[dim]{chat.about} - Ctrl-D ends[/]")
    name = model.partition("@")[0]
    if chat.question:
        console.print(f"[bold]you (a held-out row)>[/] {escape(chat.question)}")
        console.print(f"[bold green]{name}>[/] {escape(chat.answer(chat.question))}")
    while True:
        try:
            message = console.input("[bold]you>[/] ") if console.is_terminal else input()
        except EOFError:
            return
        if message.strip():
            console.print(f"[bold green]{name}>[/] {escape(chat.answer(message))}")
