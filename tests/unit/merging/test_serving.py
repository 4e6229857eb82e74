"""What stands beside the weights, and what a fresh process makes of the folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_core.artifacts import EvaluationReport
from qlora_core.errors import MergeError
from qlora_core.events import ignore
from qlora_core.merging import reload
from qlora_core.merging.card import scored_folder, write_card
from qlora_core.merging.serving import write_serving_files
from qlora_core.merging.spec import MergeSpec
from qlora_core.merging.worker import write_model

IM_END = 2


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def always_ends_its_turn(folder: Path) -> None:
    """Make the model say <|im_end|> whatever it is asked: only that row of its head is not zero."""
    weights = load_file(folder / "model.safetensors")
    head = torch.zeros_like(weights["lm_head.weight"])
    head[IM_END] = weights["model.norm.weight"] = torch.ones(head.shape[1])
    weights["model.embed_tokens.weight"].fill_(1.0)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name].zero_()
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})


def test_generation_stops_at_the_end_of_a_turn_and_of_the_text(make_case: Callable[..., MergeSpec]) -> None:
    case = make_case()
    (case.base.path / "generation_config.json").unlink()
    write_model(case, ignore)
    settings = read(case.into / "model" / "generation_config.json")
    assert settings["eos_token_id"] == [IM_END, 0] or settings["eos_token_id"][1:] == [IM_END, 0]
    assert settings["pad_token_id"] == 0


def test_settings_of_the_base_are_kept(make_case: Callable[..., MergeSpec]) -> None:
    case = make_case()
    file = case.base.path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": IM_END, "temperature": 0.6, "do_sample": True}))
    write_model(case, ignore)
    settings = read(case.into / "model" / "generation_config.json")
    assert settings["temperature"] == 0.6
    assert settings["eos_token_id"] == [IM_END, 0]


def test_the_config_says_the_dtype_of_the_weights(make_case: Callable[..., MergeSpec]) -> None:
    case = make_case("llama", torch.float32, merge={"dtype": "float16"})
    write_model(case, ignore)
    assert read(case.into / "model" / "config.json")["dtype"] == "float16"
    assert AutoModelForCausalLM.from_pretrained(case.into / "model", dtype="auto").dtype == torch.float16


def test_code_template_and_licence_travel_and_weights_do_not(
    make_case: Callable[..., MergeSpec], tmp_path: Path
) -> None:
    case = make_case()
    for name in ("modeling_own.py", "pytorch_model.bin", "manifest.json"):
        (case.base.path / name).write_text("#")
    (tmp_path / "out").mkdir()
    write_serving_files(case.base.path, case.base.path, tmp_path / "out", None)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"modeling_own.py", "LICENSE", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not names & {"pytorch_model.bin", "manifest.json", "model.safetensors"}
    tokenizer, ours = AutoTokenizer.from_pretrained(case.base.path), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours.chat_template == tokenizer.chat_template


def test_the_card_says_where_the_model_comes_from(make_case: Callable[..., MergeSpec]) -> None:
    case = make_case()
    (case.base.path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nBase.\n")
    write_model(case, ignore)
    write_card(case, 14, 21, "float32")
    card = (case.into / "model" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert all(part.digest in card for part in (case.base, case.adapter, case.dataset))
    assert "14 of 21 tensors changed" in card
    assert "1 too_long" in card


def test_scores_are_put_on_the_card_of_a_copy(make_case: Callable[..., MergeSpec], tmp_path: Path) -> None:
    case = make_case()
    write_model(case, ignore)
    write_card(case, 14, 21, "float32")
    model = case.into / "model"
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    report = EvaluationReport(
        path=tmp_path,
        base={"loss": 2.5},
        candidate={"loss": 1.25, "exact_match": 0.5},
        champion=None,
        base_digest="b" * 64,
        candidate_digest="c" * 64,
        champion_digest=None,
        data_digest="d" * 64,
        rows=24,
    )
    with scored_folder(model, report) as folder:
        card = (folder / "README.md").read_text()
        assert {file.name for file in folder.iterdir()} == before.keys()
        AutoModelForCausalLM.from_pretrained(folder)
    assert card.index("## Scores") < card.index("On 24 held-out rows") < card.index("## Training")
    assert "| loss | 2.5 | 1.25 |" in card
    assert "| exact_match |  | 0.5 |" in card
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_a_fresh_load_answers_and_stops(make_case: Callable[..., MergeSpec]) -> None:
    case = make_case()
    write_model(case, ignore)
    always_ends_its_turn(case.into / "model")
    assert reload.work(case.model_dump(mode="json"), ignore) == reload.Answers(answers=2, stopped=2)


def test_a_folder_that_does_not_stop_at_the_end_of_a_turn_is_refused(make_case: Callable[..., MergeSpec]) -> None:
    case = make_case()
    write_model(case, ignore)
    (case.into / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    with pytest.raises(MergeError, match=r"ends a turn with token 2, and .* stops at 0 only"):
        reload.work(case.model_dump(mode="json"), ignore)


def test_a_folder_that_lacks_a_tensor_is_refused(make_case: Callable[..., MergeSpec]) -> None:
    case = make_case()
    write_model(case, ignore)
    file = case.into / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(MergeError, match=r"does not load .* whole: .*model\.norm\.weight"):
        reload.work(case.model_dump(mode="json"), ignore)
