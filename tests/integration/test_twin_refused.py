"""A twin that is not the one is refused by `qlora run` before anything is prepared or trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import qlora
from tests.integration.conftest import shell
from tests.integration.recorded import runs_of
from tests.quantized import quantize_with_bitsandbytes
from tests.tiny import write_recipe

pytestmark = pytest.mark.slow
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, a model in full precision, and the same in NF4, which the recipe trains on."""
    folder = tmp_path_factory.mktemp("quantized")
    write_recipe(folder, model={"source": "local", "path": "model-NF4"})
    quantize_with_bitsandbytes(folder / "model", folder / "model-NF4")
    return folder


@pytest.fixture(scope="module")
def shared(prefect_api: str, downloads: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One home for all, so that the quantized model is fetched once."""
    return shell(prefect_api, tmp_path_factory.mktemp("home"), downloads)


def other_shape(twin: Path) -> None:
    tensors = load_file(twin / "model.safetensors")
    tensors[LAYER] = torch.zeros(96, 64)
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})


def other_vocabulary(twin: Path) -> None:
    def rename(tokenizer: dict) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["£"] = vocabulary.pop("z")
        tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "z" not in "".join(pair)]

    change(twin / "tokenizer.json", rename)


def other_tokenizer(twin: Path) -> None:
    change(twin / "tokenizer.json", lambda tokenizer: tokenizer["pre_tokenizer"].update(add_prefix_space=True))


def change(file: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("alter", "named"),
    [
        (other_shape, f"{LAYER} has shape [96, 64], not [128, 64]"),
        (other_vocabulary, "'£', not 'z'"),
        (other_tokenizer, "its tokenizer cuts text differently: "),
    ],
)
def test_a_twin_that_is_another_model_ends_the_run_before_training(alter, named, quantized, shared, tmp_path):
    twin = Path(shutil.copytree(quantized / "model", tmp_path / "twin"))
    alter(twin)
    other = f"merge_base={{source: local, path: {twin}}}"
    result = qlora("run", quantized / "recipe.yaml", "--set", other, environment=shared)
    said = " ".join((result.stdout + result.stderr).split())
    assert result.returncode == 2, said
    assert named in said
    assert "set `merge_base` to the unquantized model that it was made from" in said
    assert "Traceback" not in said
    runs = runs_of(shared, "stage")
    assert {run.data.tags["qlora.stage"] for run in runs} == {"download", "match"}
    assert (runs[-1].data.tags["qlora.stage"], runs[-1].info.status) == ("match", "FAILED")
