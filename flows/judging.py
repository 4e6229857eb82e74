"""What `qlora approve, promote, rollback, compare, lineage, delete, copy` do.

Prefect takes seconds to import, so that a command does so only where it talks to it: a rollback when it is done.
"""

import json
from collections.abc import Callable
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from flows.show import console, format_number, show_edits
from flows.terminal import print_json
from qlora_core.errors import RegistryError
from tasks import moves
from tasks.comparing import Lineage, compare, trace
from tasks.moves import Author
from tasks.registry import CHAMPION, ModelRegistry, Version
from tasks.settings import Settings
from tasks.tags import APPROVAL_RUN, AWAITING, COPIED_FROM, OPEN, PROMOTED, ROLLED_BACK


def approve(reference: str, reject: bool, reason: str, as_json: bool, settings: Settings) -> None:
    """Answer for a version that waits for approval, and let the form in Prefect know."""
    from tasks import approval

    registry, author = ModelRegistry(settings), moves.me(reason)
    version = registry.resolve(reference)
    verdict = approval.answer(registry, version, not reject, author)
    if run := version.tags.get(APPROVAL_RUN):
        _tell_prefect(lambda: approval.close_form(run, not reject, author))
    _say(registry, version, f"{version.name} version {version.number} is {verdict}.", as_json)
    _announce(version, verdict, author, settings)


def promote(reference: str, reason: str, force: bool, as_json: bool, settings: Settings) -> None:
    """Make a version the champion, after looking again at what its gates said and whom it was compared with."""
    from tasks import approval

    registry = ModelRegistry(settings)
    version = registry.resolve(reference)
    verdict = version.verdict
    if verdict == AWAITING:
        approve(reference, reject=False, reason=reason, as_json=as_json, settings=settings)
        return
    if verdict not in (PROMOTED, ROLLED_BACK, OPEN) and not force and CHAMPION not in version.aliases:
        raise RegistryError(
            f"{version.name} version {version.number} is {verdict} ({version.why or 'no reason'}); "
            "promote it all the same with --force and a --reason"
        )
    if verdict == OPEN and not force and COPIED_FROM not in version.tags:
        against = approval.compared_with(version)
    else:  # whoever serves now: a person has decided, and loses only against somebody who is faster
        champion = registry.at_alias(version.name, CHAMPION)
        against = champion.identity if champion else None
    author = moves.me(reason)
    moves.promote(registry, version.name, version.number, against, author, version.gate_summary)
    _say(registry, version, f"{version.name} version {version.number} is champion.", as_json)
    _announce(version, PROMOTED, author, settings)


def roll_back(name: str, reason: str, as_json: bool, settings: Settings) -> None:
    """Swap champion and previous; a team sees it in Prefect too."""
    registry, author = ModelRegistry(settings), moves.me(reason)
    show_edits(registry, name, on_stderr=as_json)
    old, new = moves.rollback(registry, name, author)
    said = f"{name}: version {new} is champion again, version {old} is previous. Undo with the same command."
    _say(registry, registry.version(name, new), said, as_json)
    if not settings.embedded_prefect:
        _tell_prefect(lambda: _show_rollback(name, old, new, author))


def delete(reference: str, settings: Settings) -> None:
    """Take a version out of the registry, unless an alias points at it."""
    registry = ModelRegistry(settings)
    version = registry.resolve(reference)
    registry.delete(version.name, version.number)
    console.print(f"{version.name} version {version.number} is deleted; `mlflow gc` frees what its files take.")


def copy(reference: str, to: str, as_json: bool, settings: Settings) -> None:
    """Copy a version to the registry of another MLflow server, as its challenger."""
    from tasks.copying import copy_version

    source, target = ModelRegistry(settings), ModelRegistry(settings.model_copy(update={"mlflow_server": to}))
    version = source.resolve(reference)
    made = copy_version(source, version, target)
    said = f"{version.name} version {version.number} is version {made.number} there; nothing serves it yet."
    _say(target, made, said, as_json)


def show_comparison(left: str, right: str, as_json: bool, settings: Settings) -> None:
    """Two versions side by side: scores, and what their recipes have not in common."""
    registry = ModelRegistry(settings)
    found = compare(registry, registry.resolve(left), registry.resolve(right))
    if as_json:
        print_json(console, found.model_dump_json())
        return
    names = [f"version {version.number}" for version in (found.left, found.right)]
    table = Table(found.left.name, *names, "difference", box=None, header_style="bold", padding=(0, 2))
    for what in ("aliases", "verdict", "made from"):
        table.add_row(what, *(_fact(what, version) for version in (found.left, found.right)), "")
    for score, (first, second) in found.scores.items():
        difference = "" if first is None or second is None else f"{second - first:+.4g}"
        table.add_row(score, format_number(score, first), format_number(score, second), difference)
    for key, (before, after) in found.recipe.items():
        table.add_row(key, escape(before or "-"), escape(after or "-"), "")
    console.print(table)
    if not found.same_rows:
        console.print("\n[yellow]They were scored on different rows, so their scores do not compare.[/]")


def show_lineage(reference: str, as_json: bool, settings: Settings) -> None:
    """Where a version comes from and what happened to it."""
    registry = ModelRegistry(settings)
    found = trace(registry, registry.resolve(reference))
    if as_json:
        print_json(console, found.model_dump_json())
        return
    console.print(_tree(found))


def _tree(found: Lineage) -> Tree:
    version = found.version
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    tree = Tree(f"[bold]{version.name} version {version.number}[/]{aliases}")
    done = [(event.what.replace("_", " "), event.sentence) for event in found.history]
    once = [(what, when) for what, when in found.events.items() if what not in dict(done)]
    sections = {"made from": found.made_from.items(), "MLflow runs": found.runs.items(), "what happened": once + done}
    for title, entries in sections.items():
        branch = tree.add(f"[bold]{title}[/]") if entries else tree
        for what, value in entries:
            branch.add(f"{what}  {escape(value)}")
    return tree


def _fact(what: str, version: Version) -> str:
    tags = version.tags
    facts = {
        "aliases": ", ".join(version.aliases) or "-",
        "verdict": version.verdict,
        "made from": f"{tags.get('qlora.base', '')}, data {tags.get('qlora.data_digest', '')[:8]}",
    }
    return escape(facts[what])


def _show_rollback(name: str, old: int, new: int, author: Author) -> None:
    from flows.promote import show_rollback

    show_rollback(name, old, new, author)


def _announce(version: Version, verdict: str, author: Author, settings: Settings) -> None:
    """Let who listens to the team's Prefect server hear of it."""
    if not settings.embedded_prefect:
        from tasks.publishing import announce

        announce(version, verdict, f"by {author.who}: {author.why or 'no reason given'}")


def _tell_prefect(tell: Callable[[], None]) -> None:
    """What was done is done; a Prefect server that is down must not make it look otherwise."""
    try:
        tell()
    except Exception as error:
        console.print(f"[yellow]Prefect could not be told: {escape(str(error)[:200])}[/]")


def _say(registry: ModelRegistry, version: Version, sentence: str, as_json: bool) -> None:
    """One sentence for people, the state of the model's aliases for programs."""
    if not as_json:
        console.print(sentence)
        return
    now: dict[str, Any] = registry.version(version.name, version.number).model_dump(mode="json")
    print_json(console, json.dumps({"version": now, "aliases": registry.aliases(version.name)}))
