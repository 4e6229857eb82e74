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

from qlora_core.artifacts import Record
from qlora_core.errors import ChampionChangedError, RegistryError
from tasks import tags as known_tags
from tasks.environment import user_name
from tasks.locks import registry_lock
from tasks.registry import CHALLENGER, CHAMPION, PREVIOUS, Model, ModelRegistry, Version
from tasks.tags import (
    AWAITING,
    LEFT,
    MOVE,
    PROMOTED,
    REASON,
    ROLLED_BACK,
    VERDICT,
    Aliases,
    Move,
    parse_aliases,
    parse_move,
)


class Author(Record):
    """Who moves an alias, and why."""

    who: str
    why: str


def promote(
    registry: ModelRegistry, name: str, number: int, compared_with: str | None, author: Author, reason: str
) -> None:
    """Make a version the champion, if the champion is still the model that it was compared with.

    The champion may also be the version's own model, registered under other gates: then nothing but the number of the
    version changes, and `previous` stays the model that both have replaced.

    Args:
        registry: where the model is.
        name: the registered model.
        number: the version to promote; for the champion itself, its alias is accepted as it is.
        compared_with: `Version.identity` of the champion when the version was evaluated; None if there was none.
        author: who promotes it and why.
        reason: what the gates said, kept with the verdict; empty if they were not asked.

    Raises:
        ChampionChangedError: another version became champion in the meantime.
        NotRegisteredError: there is no such model or version.
    """
    with registry_lock(registry.settings, name):
        model, version = _settled(registry, name), registry.version(name, number)
        if model.aliases.get(CHAMPION) == number:
            if left_by_moves(model) != _moved(model):  # set by hand, and accepted now
                accept(registry, name)
            if version.verdict == AWAITING:
                registry.tag(version, {VERDICT: PROMOTED, **signed("promoted", author)})
            return
        current = registry.version(name, model.aliases[CHAMPION]) if CHAMPION in model.aliases else None
        same_model = current is not None and current.model_digest in {version.model_digest} - {None}
        if (current.identity if current else None) != compared_with and not same_model:
            raise ChampionChangedError(_lost(version, compared_with, current))
        before = _moved(model)
        previous = before.get(PREVIOUS) if current is None or same_model else current.number
        after: Aliases = {CHAMPION: number} | ({PREVIOUS: previous} if previous not in (None, number) else {})
        tags = {number: {VERDICT: PROMOTED, **({REASON: reason} if reason else {}), **signed("promoted", author)}}
        _begin(registry, model, Move(kind="promotion", before=before, after=after, tags=tags))


def rollback(registry: ModelRegistry, name: str, author: Author) -> tuple[int, int]:
    """Swap `champion` and `previous`; returns the numbers of the old and the new champion.

    What the gates once said of both versions stays; what the author says is kept beside it.

    Raises:
        RegistryError: there is no champion, or no earlier one.
    """
    with registry_lock(registry.settings, name):
        model = _settled(registry, name)
        aliases = model.aliases
        if CHAMPION not in aliases or aliases.get(PREVIOUS) in (None, aliases[CHAMPION]):
            raise RegistryError(_not_rolled_back(model))
        old, new = aliases[CHAMPION], aliases[PREVIOUS]
        tags = {
            old: {VERDICT: ROLLED_BACK, **signed("rolled_back", author)},
            new: {VERDICT: PROMOTED, **signed("restored", author)},
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
    left, now = left_by_moves(model), model.aliases
    if left is None or MOVE in model.tags:
        return []
    found = [_edit(registry, model.name, alias, left.get(alias), now.get(alias)) for alias in (CHAMPION, PREVIOUS)]
    return [edit for edit in found if edit is not None]


def accept(registry: ModelRegistry, name: str) -> None:
    """Write down the aliases as they are: they are what is meant. The caller holds the lock."""
    _leave(registry, name, _moved(registry.known_model(name)))


def left_by_moves(model: Model) -> Aliases | None:
    """The aliases as the last finished move has left them; None if nothing tells."""
    return parse_aliases(model.tags[LEFT]) if LEFT in model.tags else None


def remedy(registry: ModelRegistry, model: Model) -> str | None:
    """What to type after somebody has set or removed the champion by hand; None if nobody has."""
    name, was, now = model.name, (left_by_moves(model) or {}).get(CHAMPION), model.aliases.get(CHAMPION)
    if was is None or was == now or MOVE in model.tags:
        return None
    offers = []
    if registry.find_version(name, was) is not None:
        offers.append(f"`qlora promote {name}@{was}` makes version {was} champion again")
    if now is not None:
        offers.append(f"`qlora promote {name}@{now}` accepts version {now}")
    return "; ".join(offers) or f"`qlora promote {name}@NUMBER` makes another version champion"


def me(why: str) -> Author:
    """The person at this terminal."""
    return Author(who=f"{user_name()}@{socket.gethostname()}", why=why)


def _settled(registry: ModelRegistry, name: str) -> Model:
    """The model as it is once no move is open; the caller holds the lock, so that it stays so.

    One look instead of many: every request to a server costs some 20 ms, and a promotion is to be over at once.

    Raises:
        NotRegisteredError: there is no such model.
    """
    model = registry.known_model(name)
    return model if _end(registry, model) is None else registry.known_model(name)


def _end(registry: ModelRegistry, model: Model) -> str | None:
    """Finish or take back the move that a crash has left on a model; says what was done, None if there is no move."""
    if MOVE not in model.tags:
        return None
    name, move = model.name, parse_move(model.tags[MOVE])
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
        version = registry.find_version(name, number)
        if version is None:  # deleted by hand since then
            continue
        registry.tag(version, tags)
        version = version.model_copy(update={"tags": {**version.tags, **tags}})
        registry.describe(version, version.verdict, version.why)
    _leave(registry, name, move.after)
    client.delete_registered_model_tag(name, MOVE)


def _leave(registry: ModelRegistry, name: str, aliases: Aliases) -> None:
    """Write down the aliases that are meant, so that edits by hand are noticed."""
    registry.client.set_registered_model_tag(name, LEFT, json.dumps(aliases, sort_keys=True))


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


def _not_rolled_back(model: Model) -> str:
    """Why there is nothing to swap, and what to type."""
    name, champion, previous = model.name, model.aliases.get(CHAMPION), model.aliases.get(PREVIOUS)
    was = (left_by_moves(model) or {}).get(CHAMPION)
    if champion is not None:
        also = "and also previous" if champion == previous else "and no version is previous"
        return (
            f"{name} has no earlier champion: version {champion} is champion, {also}; `qlora promote {name}@NUMBER` "
            "makes another version champion"
        )
    if previous is None:
        return f"{name} has no champion and no earlier one; `qlora promote {name}@NUMBER` makes a version champion"
    removed = "its alias was removed by hand" + (f" from version {was}" if was else "")
    offers = [f"`qlora promote {name}@{number}`" for number in dict.fromkeys((was, previous)) if number]
    return (
        f"{name} has no champion: {removed}. Version {previous} is previous. A rollback swaps both, so it needs both. "
        f"Type {' or '.join(offers)} to make that version champion. Nothing was changed"
    )


def _moved(model: Model) -> Aliases:
    """Those aliases that moves change."""
    return {alias: model.aliases[alias] for alias in (CHAMPION, PREVIOUS) if alias in model.aliases}


def signed(what: str, author: Author) -> dict[str, str]:
    """Tags that say who did something, why and when: the last time, and once for good."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    last = {f"qlora.{what}_by": author.who, f"qlora.{what}_why": author.why, f"qlora.{what}_at": at}
    return last | known_tags.event(what, author.who, author.why)


def _lost(version: Version, compared_with: str | None, current: Version | None) -> str:
    compared = f"a champion whose model is {compared_with[:12]}" if compared_with else "no champion"
    now = f"version {current.number}" if current else "none"
    return (
        f"{version.name}: version {version.number} was compared with {compared}, but the champion is now {now}. "
        "Nothing was changed; run again to compare with the new champion"
    )
