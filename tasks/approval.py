"""A person's word before a version serves: asked for by tags of the version, given once, within a time limit.

The registry is where an approval waits, so that a terminal, the form in the Prefect UI, and a program may answer, and
nothing has to keep running. Tags: `qlora.verdict` is `awaiting approval`; then `qlora.approve_before` (ISO 8601),
`qlora.compared_with` and `qlora.report`; afterwards who answered and why.
"""

from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.input import RunInput
from pydantic import Field

from qlora_core.artifacts import PromotionDecision
from qlora_core.errors import ChampionChangedError, RegistryError
from tasks import moves
from tasks import tags as known_tags
from tasks.moves import Author
from tasks.registry import ModelRegistry, Version
from tasks.tags import APPROVE_BEFORE, AWAITING, COMPARED_WITH, DECLINED, EXPIRED, PROMOTED, VERDICT

DEPLOYMENT = "promote/approval"
NOBODY = "none"
LIMIT_H = 72.0
"""How long a version waits whose own limit was lost, from the moment at which that is noticed."""


class Approval(RunInput):
    """The form in the Prefect UI."""

    decision: Literal["approve", "reject"] = Field(description="Approve: it becomes champion and servers load it.")
    your_name: str = Field(min_length=1, description="Kept with the version.")
    reason: str = Field(default="", description="Why; kept with the version.")


def ask(registry: ModelRegistry, version: Version, decision: PromotionDecision, timeout_h: float) -> None:
    """Let a version that passed its gates wait for a person; asking again does not move the time limit."""
    if version.verdict == AWAITING:
        return
    _set_limit(registry, version, timeout_h)
    registry.decide(version.name, version.number, AWAITING, decision.reason)


def seconds_left(version: Version) -> float:
    """Until the time limit; negative after it. A version whose limit was lost waits as if it were asked for now."""
    before = version.approve_before
    return LIMIT_H * 3600 if before is None else (before - datetime.now(UTC)).total_seconds()


def answer(registry: ModelRegistry, version: Version, approve: bool, author: Author) -> str:
    """Promote a version that waits for approval, or decline it; returns its verdict.

    Raises:
        RegistryError: it does not wait for approval, not any more, or the champion has changed since it was judged.
    """
    if version.verdict != AWAITING:
        raise RegistryError(
            f"{version.name} version {version.number} does not wait for approval: it is {version.verdict}"
        )
    if seconds_left(version) < 0:
        expire(registry, version)
        raise RegistryError(
            f"{version.name} version {version.number} had to be approved before {version.tags[APPROVE_BEFORE]}; "
            "retrain, or promote it all the same by `qlora promote --force`"
        )
    if not approve:
        return _decline(registry, version, author)
    try:
        against, reason = compared_with(version), version.gate_summary
        moves.promote(registry, version.name, version.number, against, author, reason)
    except ChampionChangedError:  # open again, so that the next run judges it against the new champion
        registry.untag(version, VERDICT)
        raise
    return PROMOTED


def expire(registry: ModelRegistry, version: Version) -> None:
    """Nobody answered in time."""
    why = f"nobody approved before {version.tags.get(APPROVE_BEFORE, 'the time limit')}"
    _settle(registry, version, EXPIRED, Author(who="the time limit", why=why))


def expire_or_limit(registry: ModelRegistry, version: Version) -> str | None:
    """Expire a waiting version whose time limit has passed, or set one where it was lost; says what was done."""
    if version.approve_before is None:
        before = _set_limit(registry, version, LIMIT_H)
        return (
            f"{version.name}: version {version.number} waited without a time limit; it may be approved until {before}"
        )
    if seconds_left(version) < 0:
        expire(registry, version)
        return f"{version.name}: version {version.number} expired, nobody approved it in time"
    return None


def compared_with(version: Version) -> str | None:
    """`Version.identity` of the champion that a version was judged against; None if there was no champion."""
    identity = version.tags.get(COMPARED_WITH, NOBODY)
    return None if identity == NOBODY else identity


def open_form(registry: ModelRegistry, version: Version) -> FlowRun | None:
    """Start the flow that waits with a form in the Prefect UI; None where its deployment is not set up."""
    name = f"approve {version.name} version {version.number}"
    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            return None
    run = run_deployment(
        DEPLOYMENT,
        parameters={"name": version.name, "number": version.number},
        flow_run_name=name,
        idempotency_key=f"{name} {version.tags.get(known_tags.KEY)}",
        timeout=0,
        as_subflow=False,
    )
    assert isinstance(run, FlowRun)
    registry.tag(version, {known_tags.APPROVAL_RUN: str(run.id)})
    return run


def close_form(flow_run_id: str, approve: bool, author: Author) -> None:
    """Let the flow that waits in Prefect end: somebody has answered in the registry."""
    given = {"decision": "approve" if approve else "reject", "your_name": author.who, "reason": author.why}
    with get_client(sync_client=True) as client:
        client.resume_flow_run(UUID(flow_run_id), run_input=given)


def describe(version: Version) -> str:
    """What a person is asked, as Markdown."""
    report = version.tags.get("qlora.report")
    link = f"[Read the report]({report})" if report else "Read the report, an artifact of its MLflow run"
    before = datetime.now(UTC) + timedelta(seconds=seconds_left(version))
    return (
        f"**{version.name} version {version.number}** passed its gates: {version.gate_summary}.\n\n"
        f"{link}, and answer before {before.day} {before:%B %Y, %H:%M} UTC.\n\n{_table(version)}"
    )


def _table(version: Version) -> str:
    """Base, champion and candidate, as far as they were scored."""
    models = {name: scores for name, scores in version.other_scores.items() if scores} | {"candidate": version.scores}
    lines = ["| score | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for score in version.scores:
        cells = (f"{scores[score]:.4g}" if score in scores else "" for scores in models.values())
        lines.append(f"| {score.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _decline(registry: ModelRegistry, version: Version, author: Author) -> str:
    _settle(registry, version, DECLINED, author)
    return DECLINED


def _settle(registry: ModelRegistry, version: Version, verdict: str, author: Author) -> None:
    """Write down what became of a version that waited; what its gates said stays."""
    registry.tag(version, {VERDICT: verdict, **moves.signed(verdict, author)})
    registry.describe(version, verdict, author.why or f"by {author.who}")


def _set_limit(registry: ModelRegistry, version: Version, timeout_h: float) -> str:
    before = (datetime.now(UTC) + timedelta(hours=timeout_h)).isoformat(timespec="seconds")
    registry.tag(version, {APPROVE_BEFORE: before})
    return before
