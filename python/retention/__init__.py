"""Power retention: a linear-cost replacement for attention, with a memory of fixed size."""
# ruff: noqa: E402

from retention._distribution import refuse_mixture

# Before the imports that a mixture would break.
refuse_mixture(__path__)

import torch  # noqa: F401  (first: its libraries were seen to crash when loaded behind those of `_C`)

from retention import _C, distributed, nn
from retention.cache import RetentionCache
from retention.functional import power_retention, power_retention_inference
from retention.installation import info
from retention.ops.reference import reference
from retention.ops.symmetric_power import expand, state_dim

__version__: str = _C.build_info()["version"]
__all__ = [
    "RetentionCache",
    "distributed",
    "expand",
    "info",
    "nn",
    "power_retention",
    "power_retention_inference",
    "reference",
    "state_dim",
]
