"""Power retention: a linear-cost replacement for attention, with a memory of fixed size."""

from retention import nn
from retention._inference import power_retention_inference
from retention._info import info
from retention._power_retention import power_retention
from retention._reference import reference
from retention._symmetric_power import expand, state_dim

__all__ = [
    "expand",
    "info",
    "nn",
    "power_retention",
    "power_retention_inference",
    "reference",
    "state_dim",
]
