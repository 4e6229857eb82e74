"""Who hears of a retraining: Prefect automations that send a notification block what has happened.

The server sends, so that a receiver that is down fails no flow, and a worker that died is heard of too. A block is
named as Prefect lists it, `TYPE/NAME`: `slack-webhook/team`, `sendgrid-email/oncall`, `custom-webhook/chat`, ...
"""

from collections.abc import Sequence
from uuid import UUID

from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from qlora_core.errors import QloraError
from tasks.occasions import Occasion
from tasks.publishing import VERDICT, resource
from tasks.settings import Settings

ENDINGS = {"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut"}
TAG = "retrain"
"""What every deployment of a retraining is tagged with, beside the recipe's name."""


def notify(block: str, recipe: str | None, occasions: Sequence[Occasion], settings: Settings) -> list[str]:
    """Let a block hear of a recipe, or of all; the same call with other occasions changes what it hears.

    Returns:
        The names of the automations that do it now.

    Raises:
        QloraError: there is no server, or no such block.
    """
    if settings.embedded_prefect:
        raise QloraError("PREFECT_API_URL is not set; notifications are sent by a Prefect server that stays")
    with get_client(sync_client=True) as client:
        receiver = _block(client, block)
        wanted = {
            _name(block, recipe, "verdicts"): _verdicts(
                recipe, [one for one in occasions if one is not Occasion.FAILED]
            ),
            _name(block, recipe, "failures"): _failures(recipe) if Occasion.FAILED in occasions else None,
        }
        for name, trigger in wanted.items():
            for old in client.read_automations_by_name(name):
                client.delete_automation(old.id)
            if trigger is not None:
                action = _failure_message(receiver) if trigger.expect == ENDINGS else _verdict_message(receiver)
                Automation(name=name, trigger=trigger, actions=[action]).create()
    return [name for name, trigger in wanted.items() if trigger is not None]


def _name(block: str, recipe: str | None, what: str) -> str:
    return f"{block} hears of {what} of {recipe or 'every recipe'}"


def _verdicts(recipe: str | None, occasions: Sequence[Occasion]) -> EventTrigger | None:
    if not occasions:
        return None
    return EventTrigger(
        expect={f"{VERDICT}.{occasion}" for occasion in occasions},
        match={"prefect.resource.id": resource(recipe or "*")},
        posture=Posture.Reactive,
        threshold=1,
    )


def _failures(recipe: str | None) -> EventTrigger:
    return EventTrigger(
        expect=ENDINGS,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{recipe or TAG}"},
        posture=Posture.Reactive,
        threshold=1,
    )


def _verdict_message(receiver: UUID) -> SendNotification:
    return SendNotification(
        block_document_id=receiver,
        subject="{{ event.resource.name }} version {{ event.payload.version }} {{ event.payload.verdict }}",
        body="{{ event.payload.reason }}\n{{ event.payload.report }}",
    )


def _failure_message(receiver: UUID) -> SendNotification:
    return SendNotification(
        block_document_id=receiver,
        subject="{{ flow.name }} {{ flow_run.name }}: {{ flow_run.state.name }}",
        body="{{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
    )


def _block(client: SyncPrefectClient, block: str) -> UUID:
    kind, _, name = block.partition("/")
    try:
        return client.read_block_document_by_name(name, kind).id
    except ObjectNotFound:
        known = [
            f"{found.block_type.slug}/{found.name}"
            for found in client.read_block_documents(include_secrets=False)
            if found.block_type and "notify" in (found.block_schema.capabilities if found.block_schema else ())
        ]
        raise QloraError(
            f"there is no block {block}; write TYPE/NAME as `prefect block ls` does. Blocks that notify: "
            f"{', '.join(known) or 'none; make one in the UI under Blocks, such as a Slack Webhook'}"
        ) from None
