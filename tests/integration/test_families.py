"""Every family with its real tokenizer, and a model with code of its own: from a folder to a merged model that answers.

Models are tiny and random. Qwen2 and 2.5 have the vocabulary of Qwen3 but for a few tokens at its end.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from qlora_core.artifacts import ModelSnapshot
from qlora_core.errors import SourceError
from qlora_core.events import Event, Note, ignore
from qlora_core.hub.resolve import fetch_model, resolve
from qlora_core.hub.snapshot import build
from qlora_core.merging import reload
from qlora_core.merging import worker as merging
from qlora_core.merging.spec import MergeSpec
from qlora_core.modeling.rows import TokenRows
from qlora_core.modeling.tokenizer import end_of_turn_id, load_tokenizer, tokenizer_digest
from qlora_core.recipe import LocalSource, Lora, MergeRecipe, TrainRecipe
from qlora_core.training import worker as training
from qlora_core.training.spec import TrainSpec
from tests import tiny
from tests.real import tokenizer_of, write_model

pytestmark = pytest.mark.slow
RECIPE = TrainRecipe(lora=Lora(rank=4, alpha=8), max_steps=2, effective_batch_rows=4, learning_rate=1e-2, processes=1)
FAMILIES = {
    "qwen2": ("qwen3", "qwen2", True),
    "qwen3": ("qwen3", "qwen3", True),
    "llama2": ("llama2", "llama", False),
    "llama3": ("llama3", "llama", True),
    "mistral": ("mistral", "mistral", False),
    "smollm2": ("smollm2", "llama", True),
}
"""Tokenizer, `model_type`, tied embeddings."""
CONFIGURATION = """from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODEL = """from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
CODE = (CONFIGURATION, MODEL)
PLACES = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
LOAD = """
import inspect, os, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, os.path.basename(inspect.getfile(type(model))))
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_merges_and_answers_with_its_real_tokenizer(family: str, downloads: Path, tmp_path: Path):
    vocabulary, model_type, tied = FAMILIES[family]
    tokenizer = tokenizer_of(vocabulary, downloads)
    folder = write_model(tmp_path / "base", tokenizer, model_type, tie_word_embeddings=tied)
    base = build({"into": folder, "gguf": None, "source": family, "revision": "1"}, ignore)
    events: list[Event] = []
    model = trained_and_merged(base.model_copy(update={"digest": "b" * 64}), tmp_path, events)
    assert any("fused engine: activation memory" in event.message for event in events if isinstance(event, Note))
    rows = TokenRows(tmp_path / "rows" / "prepared" / "train.arrow")
    end = end_of_turn_id(tokenizer)
    assert {int(row.input_ids[row.loss_mask == 1][-1]) for row in rows} == {end}
    assert tokenizer_digest(load_tokenizer(model)) == tokenizer_digest(load_tokenizer(folder))
    stops = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    assert end in (stops if isinstance(stops, list) else [stops])


def trained_and_merged(base: ModelSnapshot, work: Path, events: list[Event]) -> Path:
    """Two steps, the merge with its proofs, and answers of the merged folder; all in this process."""
    dataset = tiny.prepare_rows(base, work / "rows")
    (work / "train").mkdir()
    asked = TrainSpec(recipe=RECIPE, seed=3, base=base, dataset=dataset, into=work / "train")
    adapter = training.run(asked.model_dump(mode="json"), events.append).model_copy(update={"digest": "a" * 64})
    merge = MergeSpec(
        recipe=MergeRecipe(), base=base, trained=base, adapter=adapter, dataset=dataset, into=work / "merge"
    )
    merged = merging.work(merge.model_dump(mode="json"), ignore)
    assert len(merged.proof.changed) == 2 * 7
    assert reload.work(merge.model_dump(mode="json"), ignore).answers == 2
    return work / "merge" / "model"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A model folder with code of its own, that nothing else can load."""
    folder = tiny.write_model(tmp_path / "own")
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODEL)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": PLACES}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_code_of_a_model_that_brings_its_own_survives_the_merge(own: Path, tmp_path: Path):
    source = LocalSource(source="local", path=own, trust_remote_code=True, revision="0" * 64)
    with pytest.raises(SourceError) as refused:
        resolve(source, "model", tmp_path)
    pin = re.search("has the content ([0-9a-f]{64}), not 0000", str(refused.value))[1]
    pinned = resolve(source.model_copy(update={"revision": pin}), "model", tmp_path)
    base = fetch_model(pinned, tmp_path, tmp_path / "base", ignore)
    assert base.code == ("configuration_own.py", "modeling_own.py")
    events: list[Event] = []
    model = trained_and_merged(base.model_copy(update={"digest": "b" * 64}), tmp_path, events)
    assert {name: (model / name).read_text() for name in base.code} == dict(zip(base.code, CODE, strict=True))
    assert json.loads((model / "config.json").read_text())["auto_map"] == PLACES
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
    answer = subprocess.run([sys.executable, "-c", LOAD, str(model)], capture_output=True, text=True, timeout=120)
    assert answer.stdout.split() == ["OwnForCausalLM", "modeling_own.py"], answer.stderr


def test_code_that_is_not_trusted_does_not_get_in(own: Path, tmp_path: Path):
    found = resolve(LocalSource(source="local", path=own), "model", tmp_path)
    with pytest.raises(SourceError, match=r"set `trust_remote_code: true` and pin `revision`"):
        fetch_model(found, tmp_path, tmp_path / "base", ignore)
