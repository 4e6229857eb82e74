import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from qlora_core.evaluation.text_overlap import corpus_bleu, make_bleu, make_rouge

PAIRS = [
    ("The cat sat on the mat.", "The cat is on the mat."),
    ("Open the file, then close it_again!", "First open the file; then close it."),
    ("It will rain in Oslo tomorrow, by all accounts.", "Tomorrow it will rain in Oslo."),
    ("Add 2 and 3", "5"),
    ("Nothing at all", ""),
]


@pytest.mark.parametrize(("expected", "answer"), PAIRS)
def test_rouge_is_that_of_the_rouge_score_package(expected: str, answer: str) -> None:
    reference = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(expected, answer)
    ours = make_rouge()(expected, answer)
    assert list(ours.values()) == [pytest.approx(reference[kind].fmeasure) for kind in ("rouge1", "rouge2", "rougeL")]


def test_corpus_bleu_is_that_of_sacrebleu() -> None:
    reference = sacrebleu.corpus_bleu([answer for _, answer in PAIRS], [[expected for expected, _ in PAIRS]])
    assert corpus_bleu(PAIRS).score == pytest.approx(reference.score, abs=1e-9)
    assert reference.score > 10


def test_sentence_bleu_is_that_of_sacrebleu() -> None:
    for expected, answer in PAIRS:
        assert make_bleu()(expected, answer)["bleu"] == pytest.approx(sacrebleu.sentence_bleu(answer, [expected]).score)


def test_corpus_bleu_of_drawn_rows_is_that_of_sacrebleu_on_these_rows() -> None:
    drawn = [0, 0, 2, 1]
    counts = np.array([[2.0, 1.0, 1.0, 0.0, 0.0]])
    sums = corpus_bleu(PAIRS)
    reference = sacrebleu.corpus_bleu([PAIRS[row][1] for row in drawn], [[PAIRS[row][0] for row in drawn]])
    assert sums.combine(counts @ sums.rows)[0] == pytest.approx(reference.score, abs=1e-9)


def test_chinese_text_is_counted_by_characters() -> None:
    expected, answer = "今天天气很好", "今天天气不好"
    assert make_rouge()(expected, answer)["rouge_1"] == pytest.approx(5 / 6)
    reference = sacrebleu.sentence_bleu(answer, [expected], tokenize="zh")
    assert make_bleu()(expected, answer)["bleu"] == pytest.approx(reference.score)
    assert reference.score > 0
