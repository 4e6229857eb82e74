"""The flow that asks a person in the Prefect UI, and the one that shows a rollback there.

Asking is a flow of its own, not the end of a retraining: a suspended flow runs again from its top, and by then the data
of a retraining may have changed. This one only looks at the registry.
"""

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.flow_runs import suspend_flow_run
from prefect.logging import get_run_logger

from tasks.approval import Approval, answer, describe, seconds_left
from tasks.moves import Author
from tasks.publishing import announce
from tasks.registry import ModelRegistry
from tasks.settings import Settings
from tasks.tags import AWAITING


@flow(name="promote", flow_run_name="approve {name} version {number}", persist_result=False)
def promote(name: str, number: int) -> str:
    """Wait for a person's word on a version, suspended, so that no worker is kept; then promote or decline it.

    Needs a deployment, which is what lets a worker take it up again after the answer.

    Args:
        name: the registered model.
        number: the version that waits for approval.

    Returns:
        Its verdict. When somebody else has answered meanwhile, theirs.
    """
    registry = ModelRegistry(Settings())
    version = registry.version(name, number)
    if version.verdict != AWAITING:
        get_run_logger().info("Answered already: %s", version.verdict)
        return version.verdict
    form = Approval.with_initial_data(description=describe(version))
    given = suspend_flow_run(wait_for_input=form, timeout=max(1, round(seconds_left(version))), key="approval")
    author = Author(who=given.your_name, why=given.reason)
    verdict = answer(registry, version, given.decision == "approve", author)
    announce(version, verdict, f"by {author.who}: {author.why or 'no reason given'}")
    create_markdown_artifact(
        f"# {name} version {number}: {verdict}\n\nby {author.who}: {author.why or 'no reason given'}",
        key="qlora-approval",
        description="what was decided, by whom and why",
    )
    return verdict


@flow(name="rollback", flow_run_name="{name}: version {new} is champion again", persist_result=False)
def show_rollback(name: str, old: int, new: int, author: Author) -> None:
    """Leave a rollback that was done where a team looks for what happened."""
    create_markdown_artifact(
        f"# {name}: version {new} is champion again\n\nVersion {old} was rolled back by {author.who}: "
        f"{author.why or 'no reason given'}",
        key="qlora-rollback",
        description="who rolled back and why",
    )
