"""Byte-level BPE several times faster than `tokenizers`, used only where its ids were the same for all texts compared.

Kitoken (https://kitoken.dev) reads the same tokenizer.json. It gives ids alone; where each token stands in the text
follows from the bytes that it is made of, and a row whose bytes do not add up is left to the reference.
"""

import json
import unicodedata
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from kitoken import Kitoken
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HARD_TEXTS = (
    "Hello, world!  It's 12,345.67 o'clock;\n\n\n  we'LL see\tthat\r\n\r\nx=3  \n",
    " leading and trailing   ",
    "\n\n \n",
    "你好,世界。謝謝你的幫助!123年4月5日",
    "Zürich naïve café, e\u0301 and \u00e9, Å ﬁ ½ ⅷ ⁿ",
    "👩‍👩‍👧‍👦 🇨🇭 👍🏽 ❤️",
    "مرحبا بالعالم שלום עולם हिन्दी ภาษาไทย 한국어 ひらがなカタカナ",
    "def f(x):\n    return {'a': [x**2 for x in range(10)]}  # ok\n\n\tif x!=y: pass",
    "\u00a0\u2003\u200b\ufeff\u2028\u2029\u0085 \u3000x",
    "\u017f'S I'M they'RE 'tis \u2019s",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 8,
    "----====>>>> ...!!!??? $$$ %%% \\n \\\\ https://example.org/a?b=c&d=%20",
    "\x00\x01\x7f\u0300\u0301 combining first",
    "\U0001d573\U0001d58a\U0001d591 𠀀𠀁 \U0010ffff",
)
"""What tokenizers are known to disagree on: white space, contractions, digits, marks, long words, rare characters."""


class Encoded(NamedTuple):
    """Several texts as tokens, one after another."""

    ids: NDArray[np.int32]
    """`[tokens]`"""
    counts: NDArray[np.int64]
    """Tokens of each text, `[texts]`."""
    starts: NDArray[np.int64]
    """Where each token starts, in bytes of all tokens before it, `[tokens]`."""
    exact: NDArray[np.bool_]
    """Whether a text's tokens are made of as many bytes as the text, `[texts]`."""


class FastBpe:
    """A second tokenizer with the ids of a first one."""

    def __init__(self, engine: Kitoken, widths: NDArray[np.int32], needs_nfc: bool) -> None:
        self._engine, self._widths, self._needs_nfc = engine, widths, needs_nfc

    @classmethod
    def like(cls, tokenizer: "PreTrainedTokenizerFast") -> Self | None:
        """The fast twin of a tokenizer; None where it is not byte-level BPE, or where the ids of hard texts differ."""
        serialized = tokenizer.backend_tokenizer.to_str()
        spec = json.loads(serialized)
        if not _is_byte_level(spec):
            return None
        try:
            engine = Kitoken.from_tokenizers(serialized.encode())
        except ValueError:
            return None
        fast = cls(engine, _widths(spec), spec["normalizer"] is not None)
        return fast if fast._agrees_with(tokenizer, [token["content"] for token in spec["added_tokens"]]) else None

    @property
    def definition(self) -> tuple[bytes, NDArray[np.int32], bool]:
        """What another process makes it from."""
        return self._engine.to_bytes(), self._widths, self._needs_nfc

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids and places; added tokens in the texts become their ids."""
        made = self._engine.encode_all(list(texts), True)
        flat = array("i")
        for one in made:
            flat.extend(one)
        ids = np.frombuffer(flat, np.int32) if flat else np.zeros(0, np.int32)
        counts = np.fromiter(map(len, made), np.int64, len(made))
        ends = np.cumsum(self._widths[ids], dtype=np.int64)
        text_ends = np.concatenate([[0], ends])[np.cumsum(counts)]
        bytes_ = np.fromiter(map(self._bytes, texts), np.int64, len(texts))
        return Encoded(ids, counts, ends - self._widths[ids], np.diff(text_ends, prepend=0) == bytes_)

    def _bytes(self, text: str) -> int:
        if text.isascii():
            return len(text)
        if self._needs_nfc and not unicodedata.is_normalized("NFC", text):
            return -1
        return len(text.encode())

    def _agrees_with(self, tokenizer: "PreTrainedTokenizerFast", added: Sequence[str]) -> bool:
        texts = [*HARD_TEXTS, *(f" a\n{token}\nb {token}{token} " for token in added)]
        encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        return bool(self._engine.encode_all(texts, True) == [encoding.ids for encoding in encodings])


def _is_byte_level(spec: dict[str, Any]) -> bool:
    swallows = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in spec["added_tokens"])
    return (
        spec["model"]["type"] == "BPE"
        and (spec["decoder"] or {}).get("type") == "ByteLevel"
        and spec["normalizer"] in (None, {"type": "NFC"})
        and not swallows
    )


def _widths(spec: dict[str, Any]) -> NDArray[np.int32]:
    """Bytes of each token, `[vocabulary]`: byte-level BPE writes each byte as one character."""
    lengths = {at: len(token) for token, at in spec["model"]["vocab"].items()}
    lengths |= {token["id"]: len(token["content"].encode()) for token in spec["added_tokens"]}
    widths = np.zeros(max(lengths) + 1, np.int32)
    widths[list(lengths)] = list(lengths.values())
    return widths
