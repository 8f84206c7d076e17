"""Extraction: what a tuned model writes out of its records when it is given their beginnings."""
