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
from tasks.moves import PROMOTED, Author
from tasks.registry import ModelRegistry, Version

AWAITING, DECLINED, EXPIRED = "awaiting approval", "declined", "expired"
DEPLOYMENT = "promote/approval"
NOBODY = "none"


class Approval(RunInput):
    """The form in the Prefect UI."""

    decision: Literal["approve", "reject"] = Field(description="Approve: it becomes champion and servers load it.")
    your_name: str = Field(min_length=1, description="Kept with the version.")
    reason: str = Field(default="", description="Why; kept with the version.")


def ask(registry: ModelRegistry, version: Version, decision: PromotionDecision, timeout_h: float) -> None:
    """Let a version that passed its gates wait for a person; asking again does not move the time limit."""
    if version.tags.get("qlora.verdict") == AWAITING:
        return
    before = datetime.now(UTC) + timedelta(hours=timeout_h)
    registry.tag(version, {"qlora.approve_before": before.isoformat(timespec="seconds")})
    registry.decide(version.name, version.number, AWAITING, decision.reason)


def seconds_left(version: Version) -> float:
    """Until the time limit; negative after it."""
    return (datetime.fromisoformat(version.tags["qlora.approve_before"]) - datetime.now(UTC)).total_seconds()


def answer(registry: ModelRegistry, version: Version, approve: bool, author: Author) -> str:
    """Promote a version that waits for approval, or decline it; returns its verdict.

    Raises:
        RegistryError: it does not wait for approval, not any more, or the champion has changed since it was judged.
    """
    verdict = version.tags.get("qlora.verdict", "open")
    if verdict != AWAITING:
        raise RegistryError(f"{version.name} version {version.number} does not wait for approval: it is {verdict}")
    if seconds_left(version) < 0:
        expire(registry, version)
        raise RegistryError(
            f"{version.name} version {version.number} had to be approved before "
            f"{version.tags['qlora.approve_before']}; retrain, or promote it all the same by `qlora promote --force`"
        )
    if not approve:
        return _decline(registry, version, author)
    try:
        reason = version.tags.get("qlora.reason", "")
        moves.promote(registry, version.name, version.number, compared_with(version), author, reason)
    except ChampionChangedError:  # open again, so that the next run judges it against the new champion
        registry.client.delete_model_version_tag(version.name, str(version.number), "qlora.verdict")
        raise
    return PROMOTED


def expire(registry: ModelRegistry, version: Version) -> None:
    """Nobody answered in time."""
    registry.decide(
        version.name, version.number, EXPIRED, f"nobody approved before {version.tags['qlora.approve_before']}"
    )


def expire_all(registry: ModelRegistry) -> list[str]:
    """Expire every version whose time limit has passed; says which."""
    waiting = [v for v in registry.search(f"tags.`qlora.verdict` = '{AWAITING}'") if seconds_left(v) < 0]
    for version in waiting:
        expire(registry, version)
    return [f"{version.name}: version {version.number} expired, nobody approved it in time" for version in waiting]


def compared_with(version: Version) -> str | None:
    """Digest of the champion's model that a version was judged against; None if there was no champion."""
    digest = version.tags.get("qlora.compared_with", NOBODY)
    return None if digest == NOBODY else digest


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
        idempotency_key=f"{name} {version.tags.get('qlora.key')}",
        timeout=0,
        as_subflow=False,
    )
    assert isinstance(run, FlowRun)
    registry.tag(version, {"qlora.approval_run": str(run.id)})
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
    before = datetime.fromisoformat(version.tags["qlora.approve_before"])
    return (
        f"**{version.name} version {version.number}** passed its gates: {version.tags.get('qlora.reason', '')}.\n\n"
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
    registry.tag(version, moves.signed("declined", author))
    registry.decide(version.name, version.number, DECLINED, author.why or f"declined by {author.who}")
    return DECLINED
