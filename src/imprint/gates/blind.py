"""The blind baseline: can members be told from non-members by their texts alone, with no model to be audited?

Three classifiers of different kinds, because one alone misses shifts that another sees: words and pairs of words
weighted by rarity, a random forest over the words that occur, and the length. Scores are cross-validated. Features use
no label, so they are computed once from all texts.

Scores become ranks within their fold. A fold's classifier has an intercept that leans against the labels of the fold
it did not see, so raw scores pooled over the folds have a mean AUC below .5 on a random split (Parker, Günter and
Bedo 2007); ranks within a fold have mean .5, whatever the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imprint.errors import InvalidAudit
from imprint.measures.auc import codes
from imprint.types import Example, Floats

FEWEST = 10
"""Records, and groups, that each side needs: two in each test fold."""
FOLDS = 5
TREES = 200
LEAF = 3
"""Records of a leaf: leaves of one record cost a third more time and find less on WebNLG's official split."""
FREQUENT = 1000
"""Words the forest looks at, the most frequent ones: a rarer word is seen by too few trees to matter."""
TOKEN = r"\w+|[^\w\s]"
"""A word or one punctuation mark: the style of dates and numbers shows in the marks."""

Splitter = Iterable[tuple[NDArray[np.intp], NDArray[np.intp]]]


def blind_scores(
    members: Sequence[Example],
    nonmembers: Sequence[Example],
    groups: tuple[Sequence[object], Sequence[object]],
    seed: int = 0,
) -> dict[str, Floats]:
    """`tf-idf`, `bag of words` and `length` → [N] scores, members first; higher = more likely a member.

    A score is the rank of the record's cross-validated score within its fold, in (0, 1), ties at their middle. What is
    read is the prompt and the target together: what a tuned model would be audited on. The five folds are stratified,
    and a group lies in one fold.

    Args:
        groups: labels of members and of non-members; None marks a record on its own.
        seed: draws the folds and the forest.

    Raises:
        InvalidAudit: a side has fewer than ten records or groups.
    """
    for side, labels in zip(("members", "non-members"), groups, strict=True):
        if (found := len(set(codes(labels).tolist()))) < FEWEST:
            raise InvalidAudit(
                f"the blind baseline needs {FEWEST} records or groups a side, and the {len(labels)} {side} form "
                f"{found}: bring more data."
            )
    from sklearn.model_selection import StratifiedGroupKFold

    texts = [e.prompt + e.target for e in (*members, *nonmembers)]
    member_N = np.arange(len(texts)) < len(members)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    folds = list(splitter.split(np.zeros(len(texts)), member_N, codes([*groups[0], *groups[1]])))
    return {
        "tf-idf": _cross_validated(_weighted_words(texts), member_N, folds, _logistic),
        "bag of words": _cross_validated(_words(texts), member_N, folds, lambda: _forest(seed)),
        "length": _cross_validated(_lengths(texts), member_N, folds, _logistic),
    }


def _cross_validated(features: Any, member_N: NDArray[np.bool_], folds: Splitter, new: Callable[[], Any]) -> Floats:
    from scipy.stats import rankdata

    scores_N = np.zeros(len(member_N))
    for train, test in folds:
        classifier = new().fit(features[train], member_N[train])
        ranks = rankdata(classifier.predict_proba(features[test])[:, 1].round(12))
        scores_N[test] = (ranks - 0.5) / len(test)
    return scores_N


def _weighted_words(texts: list[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(token_pattern=TOKEN, ngram_range=(1, 2), sublinear_tf=True).fit_transform(texts)


def _words(texts: list[str]) -> NDArray[np.float32]:
    """[N, words] 1 where the text holds the word. Dense: trees are several times quicker on it."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(token_pattern=TOKEN, binary=True, max_features=FREQUENT, dtype=np.float32)
    dense: NDArray[np.float32] = counter.fit_transform(texts).toarray()
    return dense


def _lengths(texts: list[str]) -> Floats:
    """[N, 4] standardized: logarithms of the characters and of the words, and their squares."""
    logs = np.log1p([[len(text), len(text.split())] for text in texts])
    logs = _standardized(logs)
    return _standardized(np.hstack([logs, logs**2]))


def _standardized(columns: Floats) -> Floats:
    spread = columns.std(axis=0)
    centred: Floats = columns - columns.mean(axis=0)
    return centred / np.where(spread > 0, spread, 1)


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000)


def _forest(seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(TREES, min_samples_leaf=LEAF, n_jobs=1, random_state=seed)
