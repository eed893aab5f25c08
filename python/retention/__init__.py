"""Power retention: a linear-cost replacement for attention, with a memory of fixed size."""

from retention import nn
from retention.functional import power_retention, power_retention_inference
from retention.installation import info
from retention.ops.reference import reference
from retention.ops.symmetric_power import expand, state_dim

__all__ = [
    "expand",
    "info",
    "nn",
    "power_retention",
    "power_retention_inference",
    "reference",
    "state_dim",
]
