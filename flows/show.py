"""Tables and pages on the terminal."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flows.shutdown import this_program
from flows.terminal import print_json
from qlora_core.artifacts import ModelSnapshot, PreparedDataset
from qlora_core.recipe import Recipe
from tasks.registry import Version
from tasks.settings import Settings, without_secrets
from tasks.versions import named

if TYPE_CHECKING:  # it knows all stages and what they need, torch too
    from flows.sweep import Swept
    from tasks.promote_task import Outcome
    from tasks.registry import Model, ModelRegistry

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 160  # a file or a pipe has no edge to wrap at
VERDICTS = {
    "promoted": "[bold green]promoted to champion[/]",
    "rejected": "[bold yellow]not promoted[/]",
    "awaiting approval": "[bold cyan]waits for approval[/]",
}
SHOWN_VERSIONS = 50
SHOWN_SCORES = ("loss", "valid_call", "exact_call", "forgetting_perplexity")


def show_outcome(outcome: "Outcome", settings: Settings) -> None:
    """The verdict, the scores before and after, and what to type next."""
    report, decision = outcome.report, outcome.decision
    verdict = VERDICTS.get(outcome.verdict, outcome.verdict)
    console.print(f"\n[bold]{outcome.name} version {outcome.version}[/]: {verdict} — {decision.reason}\n")
    table = Table("metric", "base", "candidate", box=None, header_style="bold", padding=(0, 2))
    if report.champion is not None:
        table.add_column("champion")
    for metric, value in report.candidate.items():
        row = [metric, format_number(metric, report.base.get(metric)), format_number(metric, value)]
        table.add_row(*row, *([format_number(metric, report.champion.get(metric))] if report.champion else []))
    console.print(table)
    console.print(f"\nreport    {report.path / 'report.html'}")
    console.print(f"look      [bold]{this_program()} ui[/]  (MLflow and Prefect in the browser)")
    if outcome.verdict == "awaiting approval":
        console.print(
            f"approve   [bold]{this_program()} approve {outcome.name}@{outcome.version}[/]  (or with --reject)"
        )
    if outcome.verdict != "promoted" and report.champion is None:
        return
    model = f"{outcome.name}@champion"
    console.print(f"talk      [bold]{this_program()} chat {model} --example[/]")
    console.print(f"serve     models:/{model}   in MLflow at {without_secrets(settings.mlflow_uri)}")


def show_sweep(swept: "Swept", settings: Settings) -> None:
    """Every trial, the best one, and what the gates said of it."""
    keys = list(swept.trials[0].values)
    table = Table("trial", *keys, "evaluation loss", "", box=None, header_style="bold", padding=(0, 2))
    for trial in swept.trials:
        mark = "[bold green]best[/]" if trial == swept.best else f"[red]{escape(trial.error[:60])}[/]"
        loss = "" if trial.loss is None else f"{trial.loss:.4f}"
        table.add_row(str(trial.number), *(escape(trial.values[key]) for key in keys), loss, mark)
    console.print("", table)
    if swept.outcome is not None:
        show_outcome(swept.outcome, settings)
    else:
        console.print("\nThe gates have judged the best before; `qlora models` shows how, --force judges it again.")


def show_models(name: str | None, as_json: bool, settings: Settings) -> None:
    """The newest versions with aliases, verdict, scores and lineage; all of them as JSON.

    Without a name, and with more versions than a page holds, a line for each model instead.
    """
    from tasks.registry import ModelRegistry

    registry = ModelRegistry(settings)
    if as_json:
        found = registry.versions(registry.known_model(name).name) if name else registry.search()
        print_json(console, json.dumps([version.model_dump(mode="json") for version in found]))
        return
    models = [registry.known_model(name)] if name else registry.models()
    if not models:
        console.print("No registered models yet; `qlora run deployments/recipes/quickstart.yaml` makes one.")
    _warn_of_edits(registry, models)
    shown = registry.search(named(name) if name else None, newest=SHOWN_VERSIONS, models=models)
    shown = [version for version in shown if name in (None, version.name)]
    if name is None and len(shown) == SHOWN_VERSIONS:
        console.print(_overview(models, shown), markup=False)
        console.print("[dim]qlora models MODEL shows its versions[/]")
        return
    for model in dict.fromkeys(version.name for version in shown):
        console.print(f"[bold]{model}[/]", _table([version for version in shown if version.name == model]))
    if len(shown) == SHOWN_VERSIONS:
        console.print(f"[dim]the newest {SHOWN_VERSIONS}; --json has all[/]")


def show_edits(registry: "ModelRegistry", name: str, on_stderr: bool = False) -> None:
    """Warn where aliases of a model are not what the last move has left, and say what to type."""
    if model := registry.model(name):
        _warn_of_edits(registry, [model], Console(stderr=True, soft_wrap=True) if on_stderr else console)


def _warn_of_edits(registry: "ModelRegistry", models: "list[Model]", console: Console = console) -> None:
    from tasks.moves import edits_of, remedy

    for model in models:
        for sentence in (*edits_of(registry, model), remedy(registry, model)):
            if sentence:
                console.print(f"[yellow]{escape(sentence)}[/]")


def _overview(models: "list[Model]", newest: list[Version]) -> str:
    """A line a model: who serves, and what was judged last, if that is among the newest versions of all.

    Aligned here: for hundreds of models a table of rich's takes longer than half of the request for them.
    """
    last = {version.name: version for version in reversed(newest)}
    lines = [("model", "champion", "previous", "last judged", "verdict")]
    for model in models:
        champion, previous = (str(model.aliases.get(alias, "")) for alias in ("champion", "previous"))
        version = last.get(model.name)
        judged = ("", "") if version is None else (str(version.number), version.verdict)
        lines.append((model.name, champion, previous, *judged))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _table(versions: list[Version]) -> Table:
    shown = [metric for metric in SHOWN_SCORES if any(metric in version.scores for version in versions)]
    heads = (
        "version",
        "aliases",
        "verdict",
        *(metric.replace("_", " ") for metric in shown),
        "made (UTC)",
        "made from",
    )
    table = Table(*heads, box=None, padding=(0, 1), header_style="bold")
    for version in versions:
        made = datetime.fromtimestamp(version.created_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
        table.add_row(
            str(version.number),
            ", ".join(version.aliases),
            version.verdict,
            *(format_number(metric, version.scores.get(metric)) for metric in shown),
            made,
            f"{version.tags.get('qlora.base', '')}, data {version.tags.get('qlora.data_digest', '')[:8]}",
        )
    return table


def show_check(recipe: Recipe, base: ModelSnapshot, dataset: PreparedDataset, disks: Sequence[str] = ()) -> None:
    """Counts, dropped rows, three rows with their trained tokens marked, and the memory and disk that it needs."""
    from qlora_core.training.memory import plan_memory

    console.print(f"[bold]{recipe.name}[/] is ready to run.\n")
    facts = base.architecture
    console.print(f"model     {facts.model_type}, {facts.parameters / 1e6:,.1f}M parameters, {base.source}")
    for model in (base, base.twin.model) if base.twin else (base,):
        for name in model.code:
            console.print(f"code      [bold yellow]{model.path / name}[/] runs when the model is loaded")
    if base.twin is not None:
        console.print(f"merges    into {base.merge_base.source}: {base.twin.proof.tensors} tensors proven to match")
    console.print(
        f"rows      {dataset.train_rows:,} to train on, {dataset.evaluation_rows:,} to evaluate on, longest "
        f"{dataset.longest_row_tokens:,} tokens"
    )
    console.print(f"tokens    {dataset.train_tokens:,}, {dataset.trained_tokens:,} of them carry loss")
    summary = json.loads((dataset.path / "summary.json").read_text())
    for title, reasons in (("not used", summary["dropped"]), ("noticed", summary["noticed"])):
        if reasons:
            console.print(_reasons(title, reasons))
    step_tokens = round(dataset.train_tokens / dataset.train_rows * recipe.train.effective_batch_rows)
    for name, limit_gib in (("memory", 80.0), ("", 24.0)):
        plan = plan_memory(
            facts, recipe.train, dataset.longest_row_tokens, step_tokens, limit_gib * 0.9,
            quantization=base.quantization,
        )  # fmt: skip
        need = plan.estimate
        passing_gib = need.activations_gib + need.workspace_gib
        console.print(
            f"{name:9} about {need.total_gib:.1f} GiB on a GPU of {limit_gib:.0f} GB: weights {need.weights_gib:.1f}, "
            f"adapter and optimizer {need.adapter_gib:.1f}, activations {passing_gib:.1f} "
            f"({plan.activation_memory}, passes of {plan.capacity_tokens:,} tokens)"
        )
    for disk in disks:
        console.print(f"disk      {escape(disk)}")
    console.print("\nThree training rows; what carries loss is [bold green]green[/]:")
    for row in json.loads((dataset.path / "preview.json").read_text()):
        text = Text(f"\n── {row['row_id']} ", style="dim")
        text.append("─" * 60 + "\n", style="dim")
        for segment in row["segments"]:
            text.append(segment["text"], style="bold green" if segment["trained"] else "")
        console.print(text)
    console.print(f"\nThe whole page: {dataset.path / 'page.html'}", soft_wrap=True)


def _reasons(title: str, reasons: Mapping[str, Any]) -> Table:
    """Why rows are not used, or deserve a look, with an example and what to do."""
    table = Table(title, "rows", "first example", "what to do", box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.columns[1].justify = "right"
    for code, found in reasons.items():
        example = found["example"]
        place = escape(f"{example['file']}:{example['row']}: {example['detail']}")
        table.add_row(code, f"{found['rows']:,}", place, escape(found["remedy"]))
    return table


def format_number(metric: str, value: float | None) -> str:
    """A score as people read it: shares in percent; nothing for one that is missing."""
    if value is None:
        return ""
    share = metric.endswith(("_call", "_match", "_valid", "_itself", "_accuracy"))
    return f"{value:.0%}" if share else f"{value:,.3f}"
