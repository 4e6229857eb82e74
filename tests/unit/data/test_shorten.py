import json

import pytest

from qlora_core.data.conversation import Conversation, Message
from qlora_core.data.prepare import prepare
from qlora_core.data.shorten import Shortener, most_that_fit
from qlora_core.data.template import ChatTemplate
from qlora_core.data.tokenize import RowTokenizer
from qlora_core.errors import DataError
from qlora_core.events import ignore
from qlora_core.modeling.rows import TokenRows, read_prompts
from qlora_core.recipe import DataRecipe
from tests.unit.data.conftest import snapshot

LIMIT = 160


def chat(at: int, exchanges: int) -> dict:
    turns = [{"role": "system", "content": f"rules {at}"}]
    for number in range(exchanges):
        turns += [{"role": "user", "content": f"q{at}.{number}"}, {"role": "assistant", "content": f"a{number} " * 6}]
    return {"messages": turns}


@pytest.fixture
def run(base, tmp_path):
    def run(policy: str, long_chats: int = 1, long_answers: tuple[int, ...] = (), **options):
        rows = [chat(at, 1) for at in range(20)] + [chat(20 + at, 8) for at in range(long_chats)]
        rows += [{"instruction": f"q{at}", "output": "word " * 400} for at in long_answers]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        into = tmp_path / policy
        into.mkdir()
        recipe = {
            "rows": [{"source": "local", "path": "."}],
            "split": {"evaluation_fraction": 0.3},
            "seq_len_tokens": LIMIT,
            "too_long": policy,
            "near_duplicates": "ignore",
            **options,
        }
        return prepare(DataRecipe.model_validate(recipe), 17, base, snapshot(tmp_path, "rows.jsonl"), into, ignore)

    return run


def texts(dataset, chatml) -> dict[str, str]:
    sides = [TokenRows(dataset.path / f"{side}.arrow") for side in ("train", "evaluation")]
    return {row.row_id: chatml.decode(row.input_ids) for rows in sides for row in rows}


def long_ones(dataset, chatml) -> dict[str, str]:
    return {name: text for name, text in texts(dataset, chatml).items() if ":21" in name}


def test_a_long_conversation_is_cut_to_the_exchanges_that_fit(run, chatml):
    dataset = run("truncate")
    (text,) = long_ones(dataset, chatml).values()
    assert text.startswith("<|im_start|>system\nrules 20<|im_end|>\n<|im_start|>user\nq20.0")
    assert text.endswith("<|im_end|>\n")
    assert 1 <= text.count("<|im_start|>assistant") < 8
    assert dataset.noticed == {"shortened": 1}
    assert dataset.longest_row_tokens <= LIMIT


def test_a_long_conversation_becomes_several_rows_with_its_system_prompt_on_one_side(run, chatml):
    dataset = run("split")
    parts = long_ones(dataset, chatml)
    assert list(parts) == [f"rows.jsonl:21#{at}" for at in range(1, len(parts) + 1)]
    assert all(text.startswith("<|im_start|>system\nrules 20<|im_end|>\n<|im_start|>user\n") for text in parts.values())
    assert [f"q20.{at}" in "".join(parts.values()) for at in range(8)] == [True] * 8
    assert dataset.noticed == {"shortened": 1}


def test_the_prompts_of_the_parts_are_those_of_their_last_turns(run, chatml):
    dataset = run("split", long_chats=6)
    rows = TokenRows(dataset.path / "evaluation.arrow")
    prompts = read_prompts(dataset.path / "prompts.arrow")
    assert [prompt.row_id for prompt in prompts] == [row.row_id for row in rows]
    assert any("#" in prompt.row_id for prompt in prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        assert row.input_ids[: len(prompt.prompt_ids)].tolist() == prompt.prompt_ids


def test_dropping_is_what_happens_otherwise(run, chatml):
    assert run("drop").dropped == {"too_long": 1}


def test_long_rows_fail_the_stage_where_the_recipe_says_so(run):
    with pytest.raises(DataError, match=r"1 rows are longer than data.seq_len_tokens, 160(.|\n)*rows.jsonl:21"):
        run("fail")


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_an_exchange_that_is_too_long_alone_is_dropped(run, policy: str):
    dataset = run(policy, long_answers=(21,))
    assert dataset.dropped == {"too_long": 1}
    assert dataset.longest_row_tokens <= LIMIT


class CountingTokenizer(RowTokenizer):
    """Adds up how many characters it is given."""

    characters = 0

    def __call__(self, rows):
        self.characters += sum(len(row.text) for row in rows)
        return super().__call__(rows)


@pytest.mark.parametrize("plain", [True, False], ids=["text", "chat"])
def test_splitting_reads_a_text_a_few_times_however_long_it_is(chatml, plain):
    template = ChatTemplate(chatml)
    read = []
    for lines in (300, 1200) if plain else (50, 200):
        words = [f"{'word ' * (at % 17)}{at}\n" for at in range(lines)]
        turns = [Message(role, text) for text in words for role in ("user", "assistant")]
        messages = (Message("assistant", "".join(words)),) if plain else tuple(turns)
        conversation = Conversation(messages, plain=plain)
        with CountingTokenizer(chatml) as tokenize:
            parts = Shortener(template, tokenize, "assistant_turns", "split", LIMIT).parts(conversation)
            read.append(tokenize.characters / sum(len(message.content) for message in messages))
        assert len(parts) > lines / 50
        assert max(len(part.tokens.ids) for part in parts) <= LIMIT
    assert max(read) < 12
    assert read[1] < 1.2 * read[0]


@pytest.mark.parametrize("most", [1, 2, 7, 40])
def test_the_most_that_fits_is_found_from_any_guess(most):
    for limit in range(most + 1):
        for guess in (0, 1, limit, limit + 1, most, 3 * most):
            tried = []

            def fits(count: int, limit: int = limit, tried: list[int] = tried) -> bool:
                tried.append(count)
                return count <= limit

            assert most_that_fit(fits, guess, most) == limit
            assert all(1 <= count <= most for count in tried)
            assert len(tried) <= 14
            if guess == limit:
                assert len(tried) <= 2
