"""Recipe B as it is shipped, whole: a Llama with the tokenizer of Llama 2, NF4, [INST] texts, merged into itself.

Its pad token is its stop token. A loss that masks padding by id never teaches the model to stop; ours must.
Swapped are the model, for a tiny random one, its rows, and how long and fast it learns.
"""

import json
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_core.modeling.loss import collate
from qlora_core.modeling.rows import TokenRows
from qlora_core.modeling.tokenizer import load_tokenizer
from tests.commands import qlora
from tests.integration.recorded import runs_of
from tests.integration.test_recipes import PAIRS, SHIPPED
from tests.real import tokenizer_of, write_model

pytestmark = pytest.mark.slow
RECIPE = next(path for path in SHIPPED if path.stem == "llama2-guanaco-nf4")
STOP = 2
ANSWER = "It is done."


def test_recipe_b_teaches_a_llama_2_to_stop_by_itself(environment, downloads: Path, tmp_path: Path):
    base = write_model(tmp_path / "llama-2", tokenizer_of("llama2", downloads), "llama", tie_word_embeddings=False)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"text": f"<s>[INST] {asked} [/INST] {ANSWER} </s>"} for asked, _ in PAIRS]))
    swapped = {
        "model": {"source": "local", "path": str(base)},
        "data.rows": [{"source": "local", "path": str(rows)}],
        "train.learning_rate": 1e-2,
        "train.epochs": 3,
        "evaluation": {"metrics": ["loss", "exact_match"], "generation": {"max_new_tokens": 16}},
    }
    sets = [part for key, value in swapped.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    result = qlora("run", RECIPE, *sets, environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "promoted to champion" in result.stdout

    store = Path(environment["QLORA_HOME"]) / "store"
    assert_the_turn_end_is_trained(next((store / "prepare").iterdir()), base)
    said = log_of(environment)
    assert any("in float32, 1 process" in line for line in said), said
    assert any("paged_adamw_32bit needs a CUDA device" in line for line in said), said
    scores = runs_of(environment, "stage")[-3].data.metrics
    assert (scores["base.stops_by_itself"], scores["candidate.stops_by_itself"]) == (0, 1)
    assert scores["candidate.exact_match"] == 1
    assert_it_stops(next((store / "merge").iterdir()) / "model")


def assert_the_turn_end_is_trained(prepared: Path, base: Path) -> None:
    """In every row, and also where rows are padded with the same token."""
    tokenizer = load_tokenizer(base)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == STOP
    rows = TokenRows(prepared / "train.arrow")
    for row in rows:
        assert (row.input_ids[-1], row.loss_mask[-1]) == (STOP, 1)
        assert tokenizer.decode(row.input_ids[row.loss_mask == 1]) == f"{ANSWER} </s>"
    shortest, longest = (pick(range(len(rows)), key=lambda at: rows.lengths[at]) for pick in (min, max))
    length, padded = int(rows.lengths[shortest]), int(rows.lengths[longest])
    assert length < padded
    batch = collate([rows[shortest], rows[longest]], tokenizer.pad_token_id)
    assert batch.input_ids[0, length - 1 :].tolist() == [STOP] * (padded - length + 1)
    assert batch.loss_mask[0, length - 1 :].tolist() == [True] + [False] * (padded - length)


def log_of(environment: dict[str, str]) -> list[str]:
    """What the flow run has in Prefect's log."""
    (parent,) = runs_of(environment, "retrain")
    asked = {"logs": {"flow_run_id": {"any_": [parent.data.tags["prefect.flow_run_id"]]}}}
    found = httpx.post(f"{environment['PREFECT_API_URL']}/logs/filter", json=asked).raise_for_status().json()
    return [line["message"] for line in found]


def assert_it_stops(merged: Path) -> None:
    """Plain transformers, asked what was not in the rows, get an answer that ends long before they would cut it."""
    tokenizer, model = load_tokenizer(merged), AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    asked = [{"role": "user", "content": "Paint the moon red."}]
    prompt = tokenizer.apply_chat_template(asked, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=100)[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == STOP
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == ANSWER
