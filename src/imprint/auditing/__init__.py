"""Audits of models that were tuned elsewhere: what is given, what was found out about it, and its evidence."""
