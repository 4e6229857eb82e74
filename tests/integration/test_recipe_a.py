"""Recipe A as shipped, whole: Int4 by GPTQModel, two processes under ZeRO-2, merged into the twin, registered.

Swapped are the model, for a tiny one with a tokenizer of its own, its rows, and the learning rate, which is meant for
thousands of steps and not for ten.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import qlora
from tests.integration.recorded import client_of, runs_of
from tests.integration.test_recipes import PAIRS, ROWS, SHIPPED
from tests.quantized import quantize_with_gptqmodel
from tests.tiny import CONTEXT_TOKENS, write_model

pytestmark = [pytest.mark.gptq, pytest.mark.slow]
RECIPE = next(path for path in SHIPPED if path.stem == "qwen-gptq-zero2")
STAGES = ["download", "match", "prepare", "train", "merge", "evaluate", "register", "promote"]


def test_recipe_a_trains_int4_under_zero2_and_registers_a_champion_in_16_bit(environment, tmp_path: Path):
    plain = write_model(tmp_path / "Tiny-Instruct", family="qwen2")
    quantized = quantize_with_gptqmodel(plain, tmp_path / "Tiny-Instruct-GPTQ-Int4")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([ROWS["sharegpt"](*pair) for pair in PAIRS]))
    swapped = {
        "model": {"source": "local", "path": str(quantized)},
        "data.rows": [{"source": "local", "path": str(rows)}],
        "data.seq_len_tokens": CONTEXT_TOKENS,
        "train.learning_rate": 2e-2,
    }
    sets = [part for key, value in swapped.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    result = qlora("run", RECIPE, *sets, environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "promoted to champion" in result.stdout

    client = client_of(environment)
    runs = runs_of(environment, "stage")
    assert [run.data.tags["qlora.stage"] for run in runs] == STAGES
    assert {run.info.status for run in runs} == {"FINISHED"}
    stages = dict(zip(STAGES, runs, strict=True))
    assert stages["match"].data.metrics["quantized_tensors"] == 14
    assert (stages["train"].data.params["strategy"], stages["train"].data.params["processes"]) == ("zero2", "2")
    history = client.get_metric_history(stages["train"].info.run_id, "loss")
    losses = [point.value for point in history]
    assert len(losses) == 10, "5 epochs of 2 steps"
    assert losses[-1] < losses[0] - 0.3
    scores = stages["evaluate"].data.metrics
    assert scores["candidate.loss"] < scores["base.loss"]
    assert client.get_registered_model("qwen-chat-gptq").aliases == {"champion": 1}
    assert_in_16_bit(next((Path(environment["QLORA_HOME"]) / "store" / "merge").iterdir()) / "model", plain)


def assert_in_16_bit(merged: Path, plain: Path) -> None:
    """The twin's tensors under the twin's names, in float16, its linear layers changed and nothing left of GPTQ."""
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    before, after = load_file(plain / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    changed = {name for name in before if not torch.equal(before[name].half(), after[name])}
    assert changed == {name for name in before if "_proj." in name and name.endswith(".weight")}
