"""The front door: from a source in a recipe to a folder on disk."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_core.errors import SourceError
from qlora_core.events import Note, ignore
from qlora_core.hub.gguf_model import convert
from qlora_core.hub.resolve import fetch_data, fetch_model, resolve
from qlora_core.modeling.bases import quantization_of
from qlora_core.recipe import LocalSource


def local(path):
    return LocalSource(source="local", path=path)


def test_a_gguf_file_becomes_a_plain_transformers_folder(tmp_path, make_gguf, events):
    weights = make_gguf(tmp_path / "tiny.gguf", add_license="apache-2.0")
    resolved = resolve(local(tmp_path / "tiny.gguf"), "model", tmp_path / "downloads")
    snapshot = fetch_model(resolved, tmp_path / "downloads", tmp_path / "model", events.append)

    assert sorted(file.name for file in snapshot.path.iterdir()) == [
        "README.md",
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert (snapshot.dtype, snapshot.quantization, snapshot.revision) == ("bfloat16", None, resolved.revision)
    assert (snapshot.architecture.layers, snapshot.architecture.tied_embeddings) == (2, True)
    assert snapshot.architecture.parameters == sum(tensor.size for tensor in weights.values())
    assert "license: apache-2.0" in (snapshot.path / "README.md").read_text()
    assert any(isinstance(event, Note) and "dequantizing" in event.message for event in events)
    model = AutoModelForCausalLM.from_pretrained(snapshot.path, dtype=torch.float32)
    torch.testing.assert_close(
        model.get_input_embeddings().weight, torch.from_numpy(weights["token_embd.weight"]), rtol=2**-8, atol=0
    )
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(snapshot.path).eos_token_id == 2
    assert (
        json.loads((snapshot.path / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )


def test_a_model_folder_is_taken_as_it_is(model_folder, tmp_path):
    resolved = resolve(local(model_folder), "model", tmp_path / "downloads")
    snapshot = fetch_model(resolved, tmp_path / "downloads", tmp_path / "model", ignore)
    assert (snapshot.path / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()
    assert snapshot.architecture.model_type == "llama"
    assert not (snapshot.path / "scratch").exists()


def test_a_gguf_file_with_more_layers_than_tensors_is_refused(tmp_path, make_gguf):
    make_gguf(tmp_path / "a.gguf", layers=10**9)
    with pytest.raises(SourceError, match="claims more layers than it has tensors"):
        convert(tmp_path / "a.gguf", tmp_path, ignore)


def test_a_gguf_file_without_all_weights_is_refused(tmp_path, make_gguf):
    make_gguf(tmp_path / "a.gguf", layers=3)
    with pytest.raises(SourceError, match=r"has no weights for model\.layers\.2"):
        convert(tmp_path / "a.gguf", tmp_path, ignore)


def test_data_files_of_the_same_name_are_kept_apart(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.json").write_text(f'["{folder}"]')
    rows = [resolve(local(tmp_path / folder), "data", tmp_path / "downloads") for folder in ("one", "two")]
    snapshot = fetch_data(rows, rows[:1], tmp_path / "downloads", tmp_path / "data", ignore)

    assert [file.name for file in snapshot.rows] == ["rows/rows.json", "rows/rows-2.json"]
    assert [file.name for file in snapshot.forgetting] == ["forgetting/rows.json"]
    assert (snapshot.path / "rows/rows-2.json").read_text() == '["two"]'
    assert [file.bytes for file in snapshot.rows] == [7, 7]


def test_an_interrupted_attempt_leaves_nothing_behind(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    stale = tmp_path / "data" / "rows" / "stale.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("[]")
    fetch_data([resolve(local(tmp_path / "rows.json"), "data", tmp_path)], [], tmp_path, tmp_path / "data", ignore)
    assert [file.name for file in stale.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [
        (None, None),
        ({"quant_method": "gptq", "bits": 4}, "gptq-int4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bnb-nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bnb-int8"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_the_kind_of_quantization_is_read_from_the_config(quantization, kind):
    assert quantization_of({"quantization_config": quantization}) == kind


def test_the_front_door_loads_no_torch():
    check = "import sys, qlora_core.hub.resolve; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
