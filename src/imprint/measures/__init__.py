"""Measures: what attack scores and log-likelihoods amount to, always with an interval."""

from imprint.measures.auc import PairedAUC, auc, paired_auc
from imprint.measures.bootstrap import draw, tpr_over_subjects
from imprint.measures.contrast import auc_difference
from imprint.measures.perplexity import perplexity
from imprint.measures.tpr import TPR, tpr_at_fpr

__all__ = [
    "TPR",
    "PairedAUC",
    "auc",
    "auc_difference",
    "draw",
    "paired_auc",
    "perplexity",
    "tpr_at_fpr",
    "tpr_over_subjects",
]
