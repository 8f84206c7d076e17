"""Why tuning methods differ in what they remember: what each changes inside the model, on which records.

Every result is a frozen dataclass of numpy arrays and floats. `docs/mechanism.md` says how to read them.
"""

from imprint.mechanism.distance import LossShift, loss_shift
from imprint.mechanism.drift import Drift, drift
from imprint.mechanism.prefix import PrefixIdentity, prefix_identity

__all__ = ["Drift", "LossShift", "PrefixIdentity", "drift", "loss_shift", "prefix_identity"]
