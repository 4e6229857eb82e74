"""Finding the unquantized twin of a quantized model."""

import pytest

from qlora_core.artifacts import Architecture, ModelSnapshot
from qlora_core.errors import SourceError
from qlora_core.hub.resolve import find_twin
from qlora_core.hub.resolved import Resolved
from qlora_core.hub.twin import candidates
from qlora_core.recipe import HubSource, LocalSource

FACTS = Architecture(
    model_type="qwen2", layers=1, hidden=8, intermediate=8, heads=1, kv_heads=1, vocab=8, context_tokens=8,
    parameters=8, tied_embeddings=True,
)  # fmt: skip


def resolved(source):
    return Resolved(source=source, description="the quantized model", revision="0" * 40, name="model")


def snapshot(folder):
    return ModelSnapshot(path=folder, source="s", revision="r", architecture=FACTS, quantization="gptq-int4")


def repos(repo, folder, hub="huggingface"):
    found = candidates(resolved(HubSource(source=hub, repo=repo)), snapshot(folder))
    return [source.repo for source in found]


@pytest.mark.parametrize(
    ("quantized", "twins"),
    [
        ("Qwen/Qwen-1_8B-Chat-Int4", ["Qwen/Qwen-1_8B-Chat"]),
        ("Qwen/Qwen2.5-1.5B-Instruct-GPTQ-Int4", ["Qwen/Qwen2.5-1.5B-Instruct"]),
        ("Qwen/Qwen3-8B-AWQ", ["Qwen/Qwen3-8B"]),
        (
            "unsloth/SmolLM2-135M-Instruct-bnb-4bit",
            ["unsloth/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"],
        ),
        ("unsloth/Llama-3.2-1B-unsloth-bnb-4bit", ["unsloth/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"]),
        (
            "hugging-quants/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4",
            ["hugging-quants/Meta-Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"],
        ),
        (
            "RedHatAI/Mistral-7B-Instruct-v0.3-quantized.w4a16",
            ["RedHatAI/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"],
        ),
        ("acme/plain-name", []),
    ],
)
def test_names_lead_to_the_twin(quantized, twins, tmp_path):
    assert repos(quantized, tmp_path) == twins


def test_the_models_card_comes_first(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: acme/original\nbase_model_relation: quantized\n---\n# Card\n")
    assert repos("acme/copy-Int4", tmp_path, "modelscope") == ["acme/original", "acme/copy"]


def test_a_card_may_name_several(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model:\n- acme/one\n- acme/two\n- not a name\n---\n")
    assert repos("acme/other", tmp_path) == ["acme/one", "acme/two"]


def test_a_card_without_front_matter_says_nothing(tmp_path):
    (tmp_path / "README.md").write_text("# Card\n")
    assert repos("acme/other", tmp_path) == []


def test_a_folder_beside_is_found_by_its_name(tmp_path):
    quantized, twin = tmp_path / "Tiny-GPTQ-Int4", tmp_path / "Tiny"
    twin.mkdir()
    found = candidates(resolved(LocalSource(source="local", path=quantized)), snapshot(quantized))
    assert found == [LocalSource(source="local", path=twin)]


def test_the_recipe_decides_where_it_says_so(tmp_path, model_folder):
    base = resolved(HubSource(source="huggingface", repo="acme/tiny-Int4"))
    said = LocalSource(source="local", path=model_folder)
    assert find_twin(base, snapshot(tmp_path), said, tmp_path / "downloads").source == said


def test_no_twin_says_what_to_set_and_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = resolved(HubSource(source="huggingface", repo="acme/tiny-Int4"))
    with pytest.raises(SourceError, match=r"set `merge_base` to it.*\n  huggingface acme/tiny: the default branch"):
        find_twin(base, snapshot(tmp_path), None, tmp_path / "downloads")
