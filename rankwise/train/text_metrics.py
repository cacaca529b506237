"""BLEU and chrF (sacrebleu), ROUGE (rouge-score) of generated answers: the libraries that papers report them from."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from rankwise.data.examples import Prompt
from rankwise.errors import ConfigError, MissingDependency
from rankwise.train.metrics import RESAMPLES, Estimate, mean

ROUGE = ("rouge1", "rouge2", "rougeL")


def check_installed() -> None:
    """Raise MissingDependency if a library is not installed."""
    missing = [package for package in ("sacrebleu", "rouge_score") if find_spec(package) is None]
    if missing:
        raise MissingDependency(
            f"--metrics needs {' and '.join(missing).replace('_', '-')}, which is not installed: "
            "pip install 'rankwise[metrics]'"
        )


def check_answerable(questions: Sequence[Prompt]) -> None:
    """Raise ConfigError if none of the held-out prompts has a reference answer to measure others by."""
    if all(question.answer is None for question in questions):
        raise ConfigError(
            "--metrics measures answers, and no held-out row asks anything that fits (plain text has no prompt, and "
            "--max-length may cut prompts off); leave it out"
        )


def text_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, Estimate]:
    """bleu and chrf of all answers together, in [0, 100]; the mean F-measure of rouge1, rouge2 and rougeL, in [0, 1].

    BLEU and chrF are sacrebleu's with its default settings, and so is the resampling behind their intervals (mean of
    the resampled scores ± half the width of their 95 % range); ROUGE stems words (Porter), as is usual.
    Raises MissingDependency.
    """
    check_installed()
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    found = {name: _corpus_score(metric, answers, references) for name, metric in (("bleu", BLEU()), ("chrf", CHRF()))}
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {**found, **{name: mean(np.array([row[name].fmeasure for row in scores])) for name in ROUGE}}


def _corpus_score(metric: Any, answers: Sequence[str], references: Sequence[str]) -> Estimate:
    resamples = RESAMPLES if len(answers) > 1 else 1
    score = metric.corpus_score(list(answers), [list(references)], n_bootstrap=resamples)
    if resamples == 1:
        return Estimate(score.score)
    # The interval is public in the score's JSON alone, which leaves it out where every resampled score is 0.
    plain = json.loads(score.format(width=6, signature=str(metric.get_signature()), is_json=True))
    centre, half = plain.get("confidence_mean", 0.0), plain.get("confidence_var", 0.0)
    return Estimate(score.score, max(0.0, centre - half), min(100.0, centre + half))
