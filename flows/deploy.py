"""Deployments without YAML: one recipe on a schedule, in a work pool or served by this process."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from rich.console import Console

from flows.ui import local_prefect
from qlora_core.errors import RecipeError
from qlora_core.recipe import load_recipe
from tasks.occasions import Occasion
from tasks.settings import Settings

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

RECONCILE_S = 600
"""A slot that a dead process holds is lost until somebody looks."""
console = Console(highlight=False, soft_wrap=True)


def deploy(recipe: Path, cron: str | None, timezone: str, pool: str, settings: Settings) -> None:
    """Deploy the retraining of a recipe to a work pool; again with the same recipe changes that deployment.

    Raises:
        QloraError: the recipe, the cron line or the time zone is wrong, or there is no such pool.
    """
    from tasks.servers import require_pool

    require_pool(pool, settings)
    deployment = deployment_of(recipe, cron, timezone)
    deployment.apply(work_pool_name=pool)
    when = f"by `{cron}` in {timezone}" if cron else "when its data is published"
    console.print(f"[bold]{deployment.full_name}[/] retrains {when}, on workers of the pool {pool}.")
    console.print(f"now      prefect deployment run '{deployment.full_name}'")
    console.print(f"worker   prefect worker start --pool {pool} --limit 1   (one a GPU)")
    console.print(f"data     qlora data publish {recipe}")


def notify(block: str, recipe: Path | None, occasions: list[Occasion], settings: Settings) -> None:
    """Let a notification block of the Prefect server hear of a recipe, or of all.

    Raises:
        QloraError: there is no server, or no such block.
    """
    from tasks.notifying import notify as listen

    for automation in listen(block, load_recipe(recipe).name if recipe else None, occasions, settings):
        console.print(f"[bold]{automation}[/]")
    console.print("They are automations of the Prefect server, to be paused or deleted in its UI.")


def serve_flows(recipes: list[Path], cron: str | None, timezone: str, port: int, settings: Settings) -> None:
    """Run the schedules of recipes on this machine, one retraining at a time, until Ctrl-C; no worker is needed."""
    settings.make_home()
    own_server = settings.embedded_prefect
    with local_prefect(port) if own_server else nullcontext():
        from prefect import serve

        from tasks.orphans import PENDING_S, end_pending

        # On a server of its own nobody but an earlier process of this command can have taken runs up.
        for sentence in end_pending(0.0 if own_server else PENDING_S):
            console.print(sentence)
        serve(*served(recipes, cron, timezone), limit=1)


def served(recipes: list[Path], cron: str | None, timezone: str) -> "list[RunnerDeployment]":
    """What one machine needs: the retraining of each recipe, and the flow that ends what crashes leave."""
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    from flows.reconcile import reconcile

    care = RunnerDeployment.from_flow(
        reconcile, name="reconcile", interval=RECONCILE_S, entrypoint_type=EntrypointType.MODULE_PATH
    )
    return [*(deployment_of(recipe, cron, timezone) for recipe in recipes), care]


def deployment_of(recipe: Path, cron: str | None, timezone: str) -> "RunnerDeployment":
    """The retraining of a recipe, by schedule and by events about its data or its champion.

    Raises:
        RecipeError: the recipe, the cron line or the time zone is wrong.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.events import DeploymentEventTrigger
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    from flows.scheduled import retrain_recipe
    from tasks.publishing import DRIFTED, PUBLISHED, resource

    name = load_recipe(recipe).name
    _check_timezone(timezone)
    try:
        schedule = Cron(cron, timezone=timezone) if cron else None
    except ValueError:
        raise RecipeError(f"--cron {cron} is no cron line; write one such as '0 2 * * *', every night at two") from None
    trigger = DeploymentEventTrigger(
        name=f"{name}: data published or champion drifted",
        expect={PUBLISHED, DRIFTED},
        match={"prefect.resource.id": resource(name)},
    )
    return RunnerDeployment.from_flow(
        retrain_recipe,
        name=name,
        schedule=schedule,
        triggers=[trigger],
        parameters={"recipe": str(recipe.resolve())},
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        tags=["retrain", name],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def _check_timezone(timezone: str) -> None:
    try:
        ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError):
        raise RecipeError(f"--timezone {timezone} is unknown; write one such as Europe/Berlin or UTC") from None
