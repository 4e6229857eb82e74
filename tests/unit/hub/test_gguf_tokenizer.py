"""The tokenizer of a GGUF file."""

import pytest

from qlora_core.errors import SourceError
from qlora_core.hub.gguf_header import read_header
from qlora_core.hub.gguf_tokenizer import read_tokenizer


@pytest.fixture
def tokenizer_of(tmp_path, make_gguf):
    def tokenizer_of(**metadata):
        path = tmp_path / "a.gguf"
        make_gguf(path, **metadata)
        return read_tokenizer(path, read_header(path).metadata, 128)

    return tokenizer_of


def test_smollm_reads_every_digit_alone(tokenizer_of):
    assert tokenizer_of(pre="smollm").tokenize("12abc") == ["1", "2", "abc"]


def test_gpt2_merges_digits(tokenizer_of):
    assert tokenizer_of(pre="gpt-2").tokenize("12abc") == ["12", "abc"]


def test_special_tokens_are_those_of_the_file(tokenizer_of):
    tokenizer = tokenizer_of()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>",
    )  # fmt: skip
    assert tokenizer.tokenize("a<|im_end|>b") == ["a", "<|im_end|>", "b"]
    assert tokenizer.model_max_length == 128


def test_text_survives_a_round_trip(tokenizer_of):
    text = "naïve ▁ 中文\n\t12  abc"
    tokenizer = tokenizer_of()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(("asked", "first"), [(True, ["<|im_start|>"]), (False, [])])
def test_the_beginning_of_text_is_added_when_the_file_says_so(tokenizer_of, asked, first):
    tokenizer = tokenizer_of(add_add_bos_token=asked)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids) == [*first, "a"]


def test_the_chat_template_is_kept(tokenizer_of):
    text = tokenizer_of().apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n"


def test_an_unknown_pre_tokenizer_is_refused_rather_than_guessed(tokenizer_of):
    with pytest.raises(SourceError, match=r"'of-tomorrow'; known are gpt-2, smollm.*safetensors folder instead"):
        tokenizer_of(pre="of-tomorrow")
