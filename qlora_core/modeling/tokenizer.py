"""The tokenizer of a model folder, its chat template, and what identifies both."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_core.errors import SourceError
from qlora_core.modeling.remote_code import may_run_code, needs_code
from qlora_core.store import sha256_of_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ANSWER = "An answer."


def load_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """The folder's fast tokenizer, padding on the right; a missing pad token becomes the end of text.

    Raises:
        SourceError: there is none, or only a slow one, which cannot say where its tokens stand in the text.
    """
    from transformers import AutoTokenizer  # takes seconds, and a flow that reuses what is there needs none

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=may_run_code(path))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} holds no tokenizer that transformers can read: {error}{needs_code(path)}") from None
    if not tokenizer.is_fast:
        raise SourceError(f"{path} holds a slow tokenizer; a tokenizer.json is needed, convert it with transformers")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_of_turn_id(tokenizer: "PreTrainedTokenizerFast") -> int | None:
    """The special token that the chat template puts right after an assistant's words, None if there is none."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": _ANSWER}]
    after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(_ANSWER)[2]
    ids: list[int] = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of vocabulary, merges, pre-tokenizer and special tokens: equal digests give equal ids."""
    return sha256_of_json(
        {"backend": json.loads(tokenizer.backend_tokenizer.to_str()), "special": tokenizer.special_tokens_map}
    )


def template_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of the chat template, of nothing if the model has none."""
    return sha256_of_json(tokenizer.chat_template)
