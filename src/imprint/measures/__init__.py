"""Measures: what attack scores and log-likelihoods amount to, always with an interval."""

from imprint.measures.auc import PairedAUC, auc, paired_auc
from imprint.measures.bootstrap import draw, tpr_over_subjects
from imprint.measures.contrast import auc_difference
from imprint.measures.epsilon import OneRun, epsilon_ceiling, one_run_audit, one_run_epsilon
from imprint.measures.exposure import exposure, exposure_fitted
from imprint.measures.extraction import (
    Extraction,
    edit_distance,
    extractable,
    extraction,
    extraction_probability,
    longest_run,
    normalised_edit_distance,
    tries_needed,
)
from imprint.measures.perplexity import perplexity
from imprint.measures.tpr import TPR, tpr_at_fpr

__all__ = [
    "TPR",
    "Extraction",
    "OneRun",
    "PairedAUC",
    "auc",
    "auc_difference",
    "draw",
    "edit_distance",
    "epsilon_ceiling",
    "exposure",
    "exposure_fitted",
    "extractable",
    "extraction",
    "extraction_probability",
    "longest_run",
    "normalised_edit_distance",
    "one_run_audit",
    "one_run_epsilon",
    "paired_auc",
    "perplexity",
    "tpr_at_fpr",
    "tpr_over_subjects",
    "tries_needed",
]
