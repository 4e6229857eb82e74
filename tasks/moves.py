"""Moving the aliases of a registered model: promotion as compare-and-swap, rollback, and what repairs both.

MLflow has no transaction over several aliases and tags. So a move is written down first, as one tag of the registered
model, then carried out step by step, then crossed out:

    qlora.move      the move that is under way: aliases before and after, tags of versions, who and why
    qlora.aliases   what the last finished move has left, so that edits by hand are noticed

Every step may be repeated. Whoever comes after a crash (the next move, or `reconcile`) finishes the move that it finds,
or takes it back if a version that it needs is gone. Servers see a champion at every moment: its alias moves at once.
"""

import json
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from qlora_core.artifacts import Record
from qlora_core.errors import ChampionChangedError, RegistryError
from tasks.environment import user_name
from tasks.locks import registry_lock
from tasks.registry import CHALLENGER, CHAMPION, PREVIOUS, Model, ModelRegistry, Version

MOVE, LEFT = "qlora.move", "qlora.aliases"
PROMOTED, ROLLED_BACK = "promoted", "rolled back"

Aliases = dict[str, int]


class Author(Record):
    """Who moves an alias, and why."""

    who: str
    why: str


class Move(Record):
    """One change of `champion` and `previous`."""

    kind: Literal["promotion", "rollback"]
    before: Aliases
    after: Aliases
    tags: dict[int, dict[str, str]] = Field(default_factory=dict)
    """Version number to the tags that the move leaves on it."""


def promote(
    registry: ModelRegistry, name: str, number: int, compared_with: str | None, author: Author, reason: str
) -> None:
    """Make a version the champion, if the champion is still the model that it was compared with.

    Args:
        registry: where the model is.
        name: the registered model.
        number: the version to promote.
        compared_with: digest of the champion's model when the version was evaluated; None if there was none.
        author: who promotes it and why.
        reason: what the gates said, kept as the version's verdict.

    Raises:
        ChampionChangedError: another version became champion in the meantime.
        RegistryError: there is no such version.
    """
    with registry_lock(registry.settings, name):
        model, version = _settled(registry, name), registry.version(name, number)
        if model.aliases.get(CHAMPION) == number:
            return
        current = registry.version(name, model.aliases[CHAMPION]) if CHAMPION in model.aliases else None
        if (current.tags.get("qlora.model_digest") if current else None) != compared_with:
            raise ChampionChangedError(_lost(version, compared_with, current))
        after = {CHAMPION: number} | ({PREVIOUS: current.number} if current else {})
        tags = {number: {"qlora.verdict": PROMOTED, "qlora.reason": reason, **signed("promoted", author)}}
        _begin(registry, model, Move(kind="promotion", before=_moved(model), after=after, tags=tags))


def rollback(registry: ModelRegistry, name: str, author: Author) -> tuple[int, int]:
    """Swap `champion` and `previous`; returns the numbers of the old and the new champion.

    Raises:
        RegistryError: there is no earlier champion.
    """
    with registry_lock(registry.settings, name):
        model = _settled(registry, name)
        aliases = model.aliases
        if CHAMPION not in aliases or PREVIOUS not in aliases:
            raise RegistryError(f"{name} has no earlier champion; its aliases are {aliases or 'none'}")
        old, new = aliases[CHAMPION], aliases[PREVIOUS]
        tags = {
            old: {"qlora.verdict": ROLLED_BACK, "qlora.reason": author.why, **signed("rolled_back", author)},
            new: {"qlora.verdict": PROMOTED, **signed("restored", author)},
        }
        after = {CHAMPION: new, PREVIOUS: old}
        _begin(registry, model, Move(kind="rollback", before=_moved(model), after=after, tags=tags))
        return old, new


def repair(registry: ModelRegistry, name: str) -> str | None:
    """Finish or take back the move that a crash has left; says what was done, None if there was nothing to do."""
    with registry_lock(registry.settings, name):
        model = registry.model(name)
        return _end(registry, model) if model is not None else None


def edits_by_hand(registry: ModelRegistry, name: str) -> list[str]:
    """What somebody changed in MLflow itself since the last move, in words."""
    model = registry.model(name)
    return edits_of(registry, model) if model else []


def edits_of(registry: ModelRegistry, model: Model) -> list[str]:
    """The same for a model that was looked up; asks the registry only if there are any."""
    if LEFT not in model.tags or MOVE in model.tags:
        return []
    left, now = json.loads(model.tags[LEFT]), model.aliases
    found = [_edit(registry, model.name, alias, left.get(alias), now.get(alias)) for alias in (CHAMPION, PREVIOUS)]
    return [edit for edit in found if edit is not None]


def me(why: str) -> Author:
    """The person at this terminal."""
    return Author(who=f"{user_name()}@{socket.gethostname()}", why=why)


def _settled(registry: ModelRegistry, name: str) -> Model:
    """The model as it is once no move is open; the caller holds the lock, so that it stays so.

    One look instead of many: every request to a server costs some 20 ms, and a promotion is to be over at once.

    Raises:
        RegistryError: there is no such model.
    """
    model = registry.model(name)
    if model is not None and _end(registry, model) is not None:
        model = registry.model(name)
    if model is None:
        raise RegistryError(f"there is no model {name}; models: {', '.join(registry.names()) or 'none yet'}")
    return model


def _end(registry: ModelRegistry, model: Model) -> str | None:
    """Finish or take back the move that a crash has left on a model; says what was done, None if there is no move."""
    if MOVE not in model.tags:
        return None
    name, move = model.name, Move.model_validate_json(model.tags[MOVE])
    gone = [number for number in move.after.values() if registry.find_version(name, number) is None]
    if gone:
        _point(registry, model, {alias: at for alias, at in move.before.items() if registry.find_version(name, at)})
        registry.client.delete_registered_model_tag(name, MOVE)
        missing = " and ".join(map(str, gone))
        return f"{name}: the {move.kind} that was cut short was taken back, version {missing} is gone"
    _carry_out(registry, model, move)
    return f"{name}: the {move.kind} that was cut short is done, version {move.after[CHAMPION]} is champion"


def _begin(registry: ModelRegistry, model: Model, move: Move) -> None:
    registry.client.set_registered_model_tag(model.name, MOVE, move.model_dump_json())
    _carry_out(registry, model, move)


def _carry_out(registry: ModelRegistry, model: Model, move: Move) -> None:
    client, name, champion = registry.client, model.name, move.after[CHAMPION]
    _point(registry, model, move.after)
    if model.aliases.get(CHALLENGER) == champion:
        client.delete_registered_model_alias(name, CHALLENGER)
    for number, tags in move.tags.items():
        for key, value in tags.items():
            client.set_model_version_tag(name, str(number), key, value)
        reason = tags.get("qlora.reason") or registry.version(name, number).tags.get("qlora.reason", "")
        client.update_model_version(name, str(number), description=f"{tags['qlora.verdict']}: {reason}")
    client.set_registered_model_tag(name, LEFT, json.dumps(move.after, sort_keys=True))
    client.delete_registered_model_tag(name, MOVE)


def _point(registry: ModelRegistry, model: Model, aliases: Mapping[str, int]) -> None:
    """`previous` first: a crash in between leaves the old champion serving."""
    for alias in (PREVIOUS, CHAMPION):
        wanted = aliases.get(alias)
        if wanted is not None and model.aliases.get(alias) != wanted:
            registry.client.set_registered_model_alias(model.name, alias, str(wanted))
        elif wanted is None and alias in model.aliases:
            registry.client.delete_registered_model_alias(model.name, alias)


def _edit(registry: ModelRegistry, name: str, alias: str, left: int | None, now: int | None) -> str | None:
    if left == now:
        return None
    was = "nothing" if left is None else f"version {left}"
    if left is not None and registry.find_version(name, left) is None:
        was += ", which was deleted"
    return f"{name}: {alias} was set by hand to {'nothing' if now is None else f'version {now}'} (it was {was})"


def _moved(model: Model) -> Aliases:
    """Those aliases that moves change."""
    return {alias: model.aliases[alias] for alias in (CHAMPION, PREVIOUS) if alias in model.aliases}


def signed(what: str, author: Author) -> dict[str, str]:
    """Tags that say who did something, why and when."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {f"qlora.{what}_by": author.who, f"qlora.{what}_why": author.why, f"qlora.{what}_at": at}


def _lost(version: Version, compared_with: str | None, current: Version | None) -> str:
    compared = f"a champion whose model is {compared_with[:12]}" if compared_with else "no champion"
    now = f"version {current.number}" if current else "none"
    return (
        f"{version.name}: version {version.number} was compared with {compared}, but the champion is now {now}. "
        "Nothing was changed; run again to compare with the new champion"
    )
