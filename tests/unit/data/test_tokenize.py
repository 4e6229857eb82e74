import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data.fast_bpe import HARD_TEXTS, FastBpe
from qlora_core.data.template import Rendered
from qlora_core.data.tokenize import COMPARED_ROWS, RowTokenizer, UnequalIdsError, tokenize


def rendered(text: str, *cuts: int) -> Rendered:
    edges = sorted(min(cut, len(text)) for cut in cuts)
    return Rendered(text, tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b))


def assert_equal(made, reference) -> None:
    for ours, theirs in zip(made, reference, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.mask.tolist() == theirs.mask.tolist()


def test_hard_texts_have_the_same_ids_and_masks_as_with_the_reference(chatml):
    tokenizer = RowTokenizer(chatml)
    assert tokenizer.is_fast
    rows = [rendered(f"<|im_start|>user\n{text}<|im_end|>", 17, 17 + len(text) + 10) for text in HARD_TEXTS]
    assert_equal(tokenizer(rows), tokenize(chatml, rows))


@given(st.lists(st.tuples(st.text(max_size=40), st.integers(0, 40), st.integers(0, 40)), max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_text_and_span_gives_the_ids_and_mask_of_the_reference(chatml, rows):
    spans = [rendered(text, start, end) for text, start, end in rows]
    assert_equal(RowTokenizer(chatml)(spans), tokenize(chatml, spans))


def test_all_tokens_of_a_last_character_carry_loss(chatml):
    row = Rendered("a🙂", ((1, 2),))
    for tokens in (RowTokenizer(chatml)([row])[0], tokenize(chatml, [row])[0]):
        assert len(tokens.ids) > 2
        assert tokens.mask.tolist() == [0] + [1] * (len(tokens.ids) - 1)


def test_a_tokenizer_that_is_not_byte_level_has_no_fast_twin(inst):
    assert FastBpe.like(inst) is None
    rows = [rendered("<s>[INST] a [/INST] b</s>", 19, 25)]
    assert_equal(RowTokenizer(inst)(rows), tokenize(inst, rows))


def test_other_ids_than_the_reference_are_noticed(chatml):
    tokenizer = RowTokenizer(chatml)
    shuffled = np.arange(len(chatml))[::-1]

    class Wrong(FastBpe):
        def encode(self, texts):
            encoded = super().encode(texts)
            return encoded._replace(ids=shuffled[encoded.ids].astype(np.int32))

    tokenizer._fast = Wrong.like(chatml)
    with pytest.raises(UnequalIdsError):
        tokenizer([rendered("Hello", 0, 5)])


@pytest.mark.parametrize("where", [3, COMPARED_ROWS - 1, COMPARED_ROWS + 777], ids=["soon", "last", "a new script"])
def test_one_wrong_row_among_thousands_is_noticed(chatml, where):
    """The last one is beyond the rows that are all compared, and has the first Georgian letter."""
    tokenizer = RowTokenizer(chatml)

    class Wrong(FastBpe):
        def encode(self, texts):
            encoded = super().encode(texts)
            ids = encoded.ids.copy()
            for at, text in enumerate(texts):
                if text.endswith("ა"):
                    ids[encoded.counts[:at].sum()] ^= 1
            return encoded._replace(ids=ids)

    tokenizer._fast = Wrong.like(chatml)
    rows = [rendered("ok é" if at != where else "ok ა", 0, 2) for at in range(COMPARED_ROWS + 1000)]
    for start in range(0, where // 100 * 100, 100):
        tokenizer(rows[start : start + 100])
    with pytest.raises(UnequalIdsError):
        tokenizer(rows[where // 100 * 100 :][:100])
