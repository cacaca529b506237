"""How well a classifier's answers fit the labels of held-out rows: of whole texts, of label sets, of tagged words."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.data.labelled import LabelExample, LabelSetExample
from rankwise.train import metrics
from rankwise.train.metrics import Estimate

Span = tuple[int, int, str]
"""An entity: its first word, the word after its last, its type."""


def label_scores(examples: Sequence[Any], answers: Sequence[NDArray[Any]], names: Sequence[str]) -> dict[str, Estimate]:
    """The scores of a classifier's answers to `examples`, each as the example's own `answer` is; the main one first."""
    targets = [np.array(example.answer) for example in examples]
    if isinstance(examples[0], LabelExample):
        return metrics.classification(np.concatenate(targets), np.concatenate(answers))
    if isinstance(examples[0], LabelSetExample):
        return label_set_scores(np.stack(targets).astype(bool), np.stack(answers).astype(bool))
    return tag_scores(targets, answers, names)


def label_set_scores(targets: NDArray[Any], answers: NDArray[Any]) -> dict[str, Estimate]:
    """micro_f1, macro_f1 and subset_accuracy (all labels of a text right) of [n, labels] true or false."""
    counts = [part.astype(float) for part in (targets & answers, targets, answers)]
    return {
        "micro_f1": metrics.micro_f1(*(part.sum(1) for part in counts)),
        "macro_f1": metrics.macro_f1_of_counts(*counts),
        "subset_accuracy": metrics.mean((targets == answers).all(1).astype(float)),
    }


def tag_scores(
    targets: Sequence[NDArray[Any]], answers: Sequence[NDArray[Any]], names: Sequence[str]
) -> dict[str, Estimate]:
    """token_accuracy and macro_f1 of the tags of words, row by row, as numbers of `names`, and for BIO tags entity_f1.

    entity_f1 is CoNLL's (Tjong Kim Sang and De Meulder 2003): an entity is right if its first word, its last word and
    its type are; 2·right / (entities that are there + entities that were found) over all rows.
    """
    pairs = list(zip(targets, answers, strict=True))
    counts = [
        np.array([np.bincount(tags, minlength=len(names)) for tags in rows], dtype=float)
        for rows in ([one[one == other] for one, other in pairs], targets, answers)
    ]
    scores = {
        "token_accuracy": metrics.ratio(counts[0].sum(1), counts[1].sum(1)),
        "macro_f1": metrics.macro_f1_of_counts(*counts),
    }
    if not is_bio(names):
        return scores
    spans = [[entities([names[int(tag)] for tag in tags]) for tags in pair] for pair in pairs]
    sizes = np.array([(len(one & other), len(one), len(other)) for one, other in spans], dtype=float)
    return {"entity_f1": metrics.micro_f1(*sizes.T), **scores}


def is_bio(names: Sequence[str]) -> bool:
    """Whether tags mark entities: O, B-type and I-type, and no others."""
    marked = [name for name in names if name != "O"]
    return bool(marked) and all(name[:2] in ("B-", "I-") and name[2:] for name in marked)


def entities(tags: Sequence[str]) -> set[Span]:
    """The entities that BIO tags mark. As in CoNLL's own script, an I-type that continues no such entity begins one."""
    found: set[Span] = set()
    first, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, tagged = tag.partition("-")
        if mark == "I" and tagged == kind:
            continue
        if kind:
            found.add((first, place, kind))
        first, kind = place, tagged
    return found
