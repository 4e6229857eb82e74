"""The tokenizer that a GGUF file describes, as the fast tokenizer that transformers loads anywhere.

transformers (5.17) can read one from a GGUF file, but loses the pre-tokenizer, whose rules a GGUF file only names,
takes the wrong token for the end of text, and leaves the maximum length open. A byte-level BPE tokenizer is therefore
built here from the file's own vocabulary and merges; only SentencePiece vocabularies go through transformers.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_core.errors import SourceError

CONTROL, USER_DEFINED = 3, 4
"""Token types of the format that are matched before any other rule."""

SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""`tokenizer.ggml.<key>_token_id` to transformers' name."""

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def _split(pattern: str) -> PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


PRE_TOKENIZERS: dict[str, tuple[Normalizer | None, PreTokenizer]] = {
    "gpt-2": (None, _gpt2()),
    "smollm": (None, _smollm()),
    "qwen2": (normalizers.NFC(), _split(QWEN_WORDS)),
    "llama-bpe": (None, _split(LLAMA3_WORDS)),
}
"""`tokenizer.ggml.pre`, the name of the rules by which text is cut before merging, to those rules."""


def read_tokenizer(path: Path, metadata: dict[str, Any], context_tokens: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
        SourceError: its kind, or the name of its pre-tokenizer, is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level_bpe(path, metadata)
    elif kind == "llama":
        backend = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    else:
        raise SourceError(f"{path.name} has a tokenizer of kind {kind!r}; gpt2 and llama can be read")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context_tokens,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **_special_tokens(metadata),
    )


def _byte_level_bpe(path: Path, metadata: dict[str, Any]) -> Tokenizer:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise SourceError(
            f"{path.name} names the pre-tokenizer {pre!r}; known are {', '.join(PRE_TOKENIZERS)}. Without its rules "
            "the model would read other tokens than it was trained on: use the model's own safetensors folder instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    normalizer, pre_tokenizer = PRE_TOKENIZERS[pre]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _begin(metadata)
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    return tokenizer


def _begin(metadata: dict[str, Any]) -> processors.PostProcessor:
    """Puts the beginning-of-text token first, if the model was trained so."""
    if not metadata.get("tokenizer.ggml.add_bos_token", False):
        return processors.ByteLevel(trim_offsets=False)
    number = metadata["tokenizer.ggml.bos_token_id"]
    bos = metadata["tokenizer.ggml.tokens"][number]
    return processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, number)])


def _special_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    tokens = metadata["tokenizer.ggml.tokens"]
    numbers = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in SPECIAL_TOKENS.items()}
    return {name: tokens[number] for name, number in numbers.items() if number is not None}
