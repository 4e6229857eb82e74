"""What is shipped can be loaded by what it is for."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest
from prefect.flows import Flow
from ruamel.yaml import YAML

from flows.deploy import deployment_of
from qlora_core.errors import RecipeError
from qlora_core.evaluation.evaluate import check_metrics
from qlora_core.recipe import load_recipe
from tasks.publishing import DRIFTED, PUBLISHED

CHECKOUT = Path(__file__).resolve().parents[2]
RECIPES = sorted((CHECKOUT / "deployments" / "recipes").glob("*.yaml"))
DEPLOYMENTS = YAML(typ="safe").load(CHECKOUT / "deployments" / "prefect.yaml")["deployments"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path):
    recipe = load_recipe(path)
    check_metrics(recipe.evaluation, recipe.promotion.gates)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_every_deployment_names_a_flow_and_parameters_that_it_takes(deployment):
    module, _, name = deployment["entrypoint"].partition(":")
    flow = getattr(import_module(module), name)
    assert isinstance(flow, Flow)
    assert set(deployment.get("parameters", {})) <= set(inspect.signature(flow.fn).parameters)
    recipe = deployment.get("parameters", {}).get("recipe")
    assert recipe is None or (CHECKOUT / recipe).is_file()


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_every_deployment_shows_a_form_of_typed_and_described_parameters(deployment):
    module, _, name = deployment["entrypoint"].partition(":")
    schema = getattr(import_module(module), name).parameters
    for parameter in schema.properties.values():
        assert parameter.get("type") or parameter.get("$ref") or parameter.get("allOf")
        assert parameter.get("description"), parameter


def test_a_recipe_is_deployed_with_its_schedule_and_what_triggers_it():
    made = deployment_of(CHECKOUT / "deployments" / "recipes" / "quickstart.yaml", "0 2 * * *", "Europe/Berlin")
    assert made.full_name == "retrain-recipe/smollm2-tool-caller"
    assert [(s.schedule.cron, s.schedule.timezone) for s in made.schedules] == [("0 2 * * *", "Europe/Berlin")]
    (trigger,) = made.triggers
    assert trigger.expect == {PUBLISHED, DRIFTED}
    assert made.concurrency_limit == 1
    assert Path(made.parameters["recipe"]).is_absolute()


@pytest.mark.parametrize(
    ("cron", "timezone", "said"), [("0 2 * *", "UTC", "no cron line"), ("0 2 * * *", "Mars/Crater", "is unknown")]
)
def test_a_wrong_time_is_refused_before_anything_is_deployed(cron, timezone, said):
    with pytest.raises(RecipeError, match=said):
        deployment_of(CHECKOUT / "deployments" / "recipes" / "quickstart.yaml", cron, timezone)
