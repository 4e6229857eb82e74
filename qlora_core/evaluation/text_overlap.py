"""How far an answer's words overlap with those expected: ROUGE (Lin 2004) and BLEU (Papineni et al. 2002).

Both come from the packages that published figures come from, `rouge-score` and `sacrebleu`. Chinese and Japanese text,
which has no spaces, is counted character by character.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from qlora_core.errors import RecipeError
from qlora_core.evaluation.bootstrap import Array, RowSums
from qlora_core.evaluation.records import AnswerScorer, RowScores

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_HAS_CJK = re.compile(f"[{_CJK}]")
ROUGE_KINDS = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


class Words:
    """rouge-score's own tokenizer for English, where it would drop every letter of other scripts."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words without punctuation."""
        return _WORD.findall(text.lower())


def make_rouge() -> AnswerScorer:
    """`(expected, answer)` to the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, each between 0 and 1.

    Raises:
        RecipeError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing("rouge", "rouge-score") from None
    scorer = RougeScorer(list(ROUGE_KINDS.values()), tokenizer=Words())

    def rouge(expected: str, answer: str) -> RowScores:
        found = scorer.score(expected, answer)
        return {name: float(found[kind].fmeasure) for name, kind in ROUGE_KINDS.items()}

    return rouge


def make_bleu() -> AnswerScorer:
    """`(expected, answer)` to the answer's own BLEU, 0 to 100; a model's score is that of all answers together.

    Raises:
        RecipeError: sacrebleu is not installed.
    """
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        raise _missing("bleu", "sacrebleu") from None

    def bleu(expected: str, answer: str) -> RowScores:
        scorer = _bleu(_tokenization(expected), effective_order=True)
        return {"bleu": float(scorer.sentence_score(answer, [expected]).score)}

    return bleu


def corpus_bleu(pairs: Iterable[tuple[str, str]]) -> RowSums:
    """BLEU of all `(expected, answer)` together, as sums over rows of lengths, n-gram matches and n-grams."""
    rows = []
    for expected, answer in pairs:
        found = _bleu(_tokenization(expected), effective_order=False).corpus_score([answer], [[expected]])
        rows.append([found.sys_len, found.ref_len, *found.counts, *found.totals])
    return RowSums(np.array(rows, dtype=np.float64), _bleu_of_sums)


def _bleu_of_sums(sums: Array) -> Array:
    """`[draws, 10]` to BLEU `[draws]`."""
    from sacrebleu.metrics.bleu import BLEU

    def score(row: list[int]) -> float:
        return float(BLEU.compute_bleu(row[2:6], row[6:10], row[0], row[1], smooth_method="exp").score)

    return np.array([score(row) for row in sums.round().astype(int).tolist()])


@cache
def _bleu(tokenization: str, effective_order: bool) -> "BLEU":
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenization, effective_order=effective_order)


def _tokenization(expected: str) -> str:
    """What sacrebleu calls how this text is cut into tokens: its default, or characters."""
    return "zh" if _HAS_CJK.search(expected) else "13a"


def _missing(metric: str, package: str) -> RecipeError:
    return RecipeError(
        f"evaluation.metrics names `{metric}`, which needs {package}; run `pip install 'qlora-flows[eval]'`"
    )
