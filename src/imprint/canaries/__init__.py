"""Canaries: records made for the purpose, which a coin each puts into the data, and what a tuned model says of them."""

from imprint.canaries.insert import insert
from imprint.canaries.judge import CanaryAudit, audit_canaries
from imprint.canaries.make import make
from imprint.canaries.manifest import Canary, Manifest, Space, candidates, read_manifest, write_manifest

__all__ = [
    "Canary",
    "CanaryAudit",
    "Manifest",
    "Space",
    "audit_canaries",
    "candidates",
    "insert",
    "make",
    "read_manifest",
    "write_manifest",
]
