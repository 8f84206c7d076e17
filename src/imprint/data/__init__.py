"""Sources of records, and how they are divided."""

from imprint.data.benchmarks import BENCHMARKS
from imprint.data.given import read_sides
from imprint.data.pool import Pool, read_pool
from imprint.data.split import make_split, resolve_sizes

__all__ = ["BENCHMARKS", "Pool", "make_split", "read_pool", "read_sides", "resolve_sizes"]
