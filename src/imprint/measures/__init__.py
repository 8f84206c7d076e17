"""Measures: what attack scores and log-likelihoods amount to, always with an interval."""

from imprint.measures.auc import PairedAUC, auc, paired_auc
from imprint.measures.perplexity import perplexity
from imprint.measures.tpr import TPR, tpr_at_fpr

__all__ = ["TPR", "PairedAUC", "auc", "paired_auc", "perplexity", "tpr_at_fpr"]
