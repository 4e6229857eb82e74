"""The real packages of the quickstart, fetched once per machine."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_core.events import ignore
from qlora_core.hub import package as packages
from qlora_core.hub.gguf_header import read_header
from qlora_core.hub.gguf_tokenizer import read_tokenizer
from qlora_core.hub.resolve import fetch_data, fetch_model, resolve
from qlora_core.recipe import PackageSource
from tests.real import SMOLLM2

LLAMAFACTORY = PackageSource(
    source="package",
    package="llamafactory==0.9.5",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    file="data/glaive_toolcall_en_demo.json",
)


def test_the_tool_calls_are_found_in_the_sdist(downloads, tmp_path):
    text = LLAMAFACTORY.model_copy(update={"file": "data/wiki_demo.txt"})
    rows, forgetting = ([resolve(source, "data", downloads)] for source in (LLAMAFACTORY, text))
    snapshot = fetch_data(rows, forgetting, downloads, tmp_path / "data", ignore)
    assert [(file.name, file.bytes) for file in (*snapshot.rows, *snapshot.forgetting)] == [
        ("rows/glaive_toolcall_en_demo.json", 738_925),
        ("forgetting/wiki_demo.txt", 1_028_326),
    ]


def test_smollm2_gets_its_own_tokenizer_back(downloads, tmp_path):
    files = packages.model_files(SMOLLM2, resolve(SMOLLM2, "model", downloads), downloads, tmp_path, ignore)
    (path,) = files.values()
    tokenizer = read_tokenizer(path, read_header(path).metadata, 8192)
    assert len(tokenizer) == 49_152
    assert tokenizer.tokenize("In 1984") == ["In", "Ġ", "1", "9", "8", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_smollm2_answers_after_its_conversion(downloads, tmp_path):
    snapshot = fetch_model(resolve(SMOLLM2, "model", downloads), downloads, tmp_path / "model", ignore)
    assert snapshot.architecture.parameters == 134_515_008
    assert (snapshot.path / "model.safetensors").stat().st_size == 269_060_552
    tokenizer = AutoTokenizer.from_pretrained(snapshot.path)
    model = AutoModelForCausalLM.from_pretrained(snapshot.path, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
