"""What is shipped can be loaded by what it is for."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest
from prefect.flows import Flow
from ruamel.yaml import YAML

from qlora_core.evaluation.evaluate import check_metrics
from qlora_core.recipe import load_recipe

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
