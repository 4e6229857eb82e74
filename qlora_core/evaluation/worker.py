"""The evaluation's child process: load one model, score it, leave behind what it said."""

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qlora_core.artifacts import Directions, ModelScores, PreparedDataset, Record, Scores
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.choice import choose
from qlora_core.evaluation.generation import Answer, end_of_turn_ids, generate, has_room
from qlora_core.evaluation.likelihood import row_losses
from qlora_core.evaluation.metrics import Need, find_metrics, make_scorer
from qlora_core.evaluation.records import AnswerScorer, EvaluationSpec
from qlora_core.evaluation.scored import RowLoss, Rows, ScoredAnswer, row_sums, write_rows
from qlora_core.events import Note, Progress, Report
from qlora_core.modeling.context import context_tokens
from qlora_core.modeling.device import pick_device
from qlora_core.modeling.load import load_full
from qlora_core.modeling.rows import PromptRow, TokenRow, TokenRows, read_prompts
from qlora_core.modeling.tokenizer import load_tokenizer, tokenizer_digest
from qlora_core.recipe import Generation

LATENCY_PROMPTS = 5


class Subject(NamedTuple):
    """The model under evaluation and whom to tell about it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    report: Report


def run(spec: Mapping[str, Any], report: Report) -> ModelScores:
    """Score one model on the evaluation rows and leave what it scored on each row (see `scored.py`).

    Raises:
        RecipeError: a metric lacks a package, or a key of the recipe.
        EvaluationError: the model reads other token ids than the data holds, or there is nothing to score.
    """
    evaluation = EvaluationSpec.model_validate(spec)
    metrics = find_metrics(evaluation.recipe.metrics)
    scorer = make_scorer(metrics, evaluation.recipe)
    tokenizer = load_tokenizer(evaluation.model_path)
    _check_tokenizer(tokenizer, evaluation)
    subject = Subject(load_full(evaluation.model_path, pick_device()), tokenizer, report)
    scored, speed, directions = _score(subject, evaluation, {metric.needs for metric in metrics.values()}, scorer)
    write_rows(evaluation.into, scored)
    return ModelScores(
        path=evaluation.into,
        model_digest=evaluation.model_digest,
        data_digest=evaluation.dataset.digest,
        scores={name: sums.score for name, sums in row_sums(scored).items()} | speed,
        rows=len(scored.losses),
        seed=evaluation.seed,
        directions=directions,
    )


def _score(
    subject: Subject, evaluation: EvaluationSpec, needs: set[Need], scorer: AnswerScorer
) -> tuple[Rows, Scores, Directions]:
    """What each row gives, the scores that no row gives, and which way those of the harness are better."""
    recipe, dataset = evaluation.recipe, evaluation.dataset
    rows = _choose(_read(dataset, "evaluation"), recipe.max_rows, evaluation.seed)
    scored = Rows(losses=_losses(subject, rows, "evaluation rows"))
    if "forgetting" in needs:
        scored = _with(scored, other=_losses(subject, _read(dataset, "forgetting"), "other text"))
    speed: Scores = {}
    directions: Directions = {}
    if "harness" in needs and recipe.harness is not None:
        from qlora_core.evaluation.harness import run_tasks

        batch_size, cache = recipe.generation.batch_size, evaluation.into / "child" / "datasets"
        rows_of, speed, directions = run_tasks(
            subject.model, subject.tokenizer, recipe.harness, batch_size, evaluation.seed, cache
        )
        scored = _with(scored, harness=rows_of)
    if needs.isdisjoint({"answers", "choices", "latency"}):
        return scored, speed, directions
    prompts = _prompts_of(rows, dataset)
    if "choices" in needs:
        tell = _progress(subject.report, "choices", len(prompts))
        scored = _with(scored, choices=tuple(choose(subject.model, subject.tokenizer, prompts, tell)))
    if "answers" in needs:
        answers, speed["generation_tokens_per_s"] = _answer(subject, prompts, recipe.generation)
        scored = _with(scored, answers=_score_answers(subject.tokenizer, scorer, prompts, answers, scored.losses))
    if "latency" in needs:
        speed["latency_s"] = _latency_s(subject, prompts, recipe.generation)
    return scored, speed, directions


def _with(scored: Rows, **parts: Sequence[Record]) -> Rows:
    return scored.model_copy(update={name: tuple(part) for name, part in parts.items()})


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, evaluation: EvaluationSpec) -> None:
    if tokenizer_digest(tokenizer) != evaluation.dataset.tokenizer_digest:
        raise EvaluationError(
            f"{evaluation.model_path} has another tokenizer than the one that the data in {evaluation.dataset.path} "
            "was prepared with, so its scores would mean nothing; evaluate models of one base only"
        )


def _read(dataset: PreparedDataset, name: str) -> TokenRows:
    path = dataset.path / f"{name}.arrow"
    rows = TokenRows(path) if path.is_file() else ()
    if not rows:
        key = "data.split.evaluation_fraction" if name == "evaluation" else "data.forgetting"
        raise EvaluationError(f"{path} holds no rows to score; set `{key}`, or take the metric out of the recipe")
    return rows


def _choose(rows: Sequence[TokenRow], most: int | None, seed: int) -> list[TokenRow]:
    """All rows, or a sample that depends on the seed alone, so that every model answers the same questions."""
    if most is None or most >= len(rows):
        return [rows[index] for index in range(len(rows))]
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), most))]


def _prompts_of(rows: Sequence[TokenRow], dataset: PreparedDataset) -> list[PromptRow]:
    chosen = {row.row_id for row in rows}
    path = dataset.path / "prompts.arrow"
    prompts = [prompt for prompt in read_prompts(path) if prompt.row_id in chosen]
    if not prompts:
        raise EvaluationError(f"{path} holds no prompts; metrics that look at answers need rows with an assistant turn")
    return prompts


def _losses(subject: Subject, rows: Sequence[TokenRow], what: str) -> tuple[RowLoss, ...]:
    progress = _progress(subject.report, what, len(rows))
    return tuple(row_losses(subject.model, rows, subject.tokenizer.pad_token_id, progress))


def _answer(subject: Subject, prompts: Sequence[PromptRow], generation: Generation) -> tuple[list[Answer], float]:
    """The answers, and how many tokens a second were generated."""
    full = sum(not has_room(subject.model, prompt.prompt_ids) for prompt in prompts)
    if full:
        subject.report(
            Note(
                message=f"{full} of {len(prompts)} prompts fill the model's context of "
                f"{context_tokens(subject.model.config):,} tokens; their answers are empty and count as wrong. Lower "
                "data.seq_len_tokens, or shorten these rows"
            )
        )
    stop_ids = end_of_turn_ids(subject.model, subject.tokenizer)
    progress = _progress(subject.report, "answers", len(prompts))
    start = time.perf_counter()
    answers = generate(subject.model, [prompt.prompt_ids for prompt in prompts], stop_ids, generation, progress)
    return answers, sum(len(answer.ids) + answer.stopped for answer in answers) / (time.perf_counter() - start)


def _latency_s(subject: Subject, prompts: Sequence[PromptRow], generation: Generation) -> float:
    """Median seconds for one whole answer when nothing else is asked, over a few prompts of all lengths."""
    by_length = sorted((prompt.prompt_ids for prompt in prompts), key=len)
    asked = by_length[:: max(1, len(by_length) // LATENCY_PROMPTS)][:LATENCY_PROMPTS]
    stop_ids = end_of_turn_ids(subject.model, subject.tokenizer)
    seconds = []
    for prompt in asked:
        start = time.perf_counter()
        generate(subject.model, [prompt], stop_ids, generation, lambda _: None)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _score_answers(
    tokenizer: PreTrainedTokenizerFast,
    scorer: AnswerScorer,
    prompts: Sequence[PromptRow],
    answers: Sequence[Answer],
    losses: Iterable[RowLoss],
) -> list[ScoredAnswer]:
    loss_of = {row.row_id: row.loss_sum / row.tokens for row in losses if row.tokens}
    texts = [tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in answers]
    return [
        ScoredAnswer(
            row_id=prompt.row_id,
            question=_question(prompt),
            prompt=prompt.prompt,
            expected=prompt.expected,
            answer=text,
            stopped=answer.stopped,
            tokens=len(answer.ids),
            metrics=scorer(prompt.expected, text),
            loss=loss_of.get(prompt.row_id),
        )
        for prompt, answer, text in zip(prompts, answers, texts, strict=True)
    ]


def _question(prompt: PromptRow) -> str:
    spoken = [message["content"] for message in json.loads(prompt.messages) if message["role"] == "user"]
    return spoken[-1] if spoken else prompt.prompt


def _progress(report: Report, what: str, total: int) -> Callable[[int], None]:
    def tell(done: int) -> None:
        report(Progress(what=what, done=done, total=total, unit="rows"))

    return tell
