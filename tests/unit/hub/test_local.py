"""Models and data that lie on this machine already."""

import os

import pytest

from qlora_core.errors import SourceError
from qlora_core.events import ignore
from qlora_core.hub import local
from qlora_core.recipe import LocalSource


def source_of(path):
    return LocalSource(source="local", path=path)


def data_files(path, downloads):
    source = source_of(path)
    return local.data_files(source, local.resolve(source, "data", downloads), downloads, path, ignore)


def model_files(path, downloads):
    source = source_of(path)
    return local.model_files(source, local.resolve(source, "model", downloads), downloads, path, ignore)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def test_the_revision_follows_the_content(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[1]")
    first = local.resolve(source_of(rows), "data", tmp_path).revision
    rows.write_text("[2]")
    os.utime(rows, ns=(1, 1))
    assert local.resolve(source_of(rows), "data", tmp_path).revision != first
    rows.write_text("[1]")
    assert local.resolve(source_of(rows), "data", tmp_path).revision == first


def test_a_missing_path_names_what_is_beside_it(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(SourceError, match=r"rows\.json does not exist; that folder holds .*rows\.jsonl"):
        local.resolve(source_of(tmp_path / "rows.json"), "data", tmp_path / "downloads")


def test_a_data_folder_gives_its_data_files_and_nothing_else(tmp_path):
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    for name in ("a.json", "more/b.parquet", "README.md", "dataset_infos.json", ".hidden.json", "picture.png"):
        (folder / name).write_text("[]")
    assert sorted(data_files(folder, tmp_path / "downloads")) == ["a.json", "more/b.parquet"]


def test_a_model_folder_gives_one_copy_of_the_weights(model, tmp_path):
    for name in ("pytorch_model.bin", "consolidated.safetensors", "tf_model.h5", "LICENSE", "chat_template.jinja"):
        (model / name).write_text("{}")
    assert sorted(model_files(model, tmp_path / "downloads")) == [
        "LICENSE", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_pickled_weights_are_refused_with_a_way_out(model, tmp_path):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"only as pickles \(pytorch_model\.bin\).*save_pretrained"):
        local.resolve(source_of(model), "model", tmp_path / "downloads")


def test_a_missing_shard_is_named(model, tmp_path):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SourceError, match=r"names model-00002-of-00002\.safetensors; copy them there"):
        local.resolve(source_of(model), "model", tmp_path / "downloads")


def test_a_data_file_is_no_model(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    with pytest.raises(SourceError, match=r"is no model; it must be a folder with a config\.json, or a \.gguf file"):
        model_files(rows, tmp_path / "downloads")


def test_a_source_that_changes_after_it_was_pinned_is_refused(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[1]")
    resolved = local.resolve(source_of(rows), "data", tmp_path)
    rows.write_text("[1, 2]")
    with pytest.raises(SourceError, match="changed while it was being used"):
        local.data_files(source_of(rows), resolved, tmp_path, tmp_path, ignore)


def test_a_pattern_takes_the_data_files_that_fit(tmp_path):
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    for name in ("a1.jsonl", "a2.jsonl", "b1.jsonl", "a3.png", "more/a4.jsonl"):
        (folder / name).write_text("{}\n")
    assert sorted(data_files(folder / "a*", tmp_path / "downloads")) == ["a1.jsonl", "a2.jsonl"]
    assert sorted(data_files(folder / "**" / "a*.jsonl", tmp_path / "downloads")) == [
        "a1.jsonl",
        "a2.jsonl",
        "more/a4.jsonl",
    ]
    with pytest.raises(SourceError, match=r"c\* holds no data files"):
        data_files(folder / "c*", tmp_path / "downloads")
