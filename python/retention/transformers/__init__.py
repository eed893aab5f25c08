"""Power retention in Hugging Face's transformers: models, their cache, and attention by name.

Importing this module makes the model types ``retention``, ``powercoder`` and ``brumby`` known to
``AutoConfig``, ``AutoModel``, ``AutoModelForCausalLM`` and the two classifiers, and the attention
``power_retention`` known to all other models. It needs ``power-retention[transformers]``.
"""
# ruff: noqa: E402

from retention.transformers._requirement import check_transformers

# Before the imports that an older version would break, with messages that help nobody.
check_transformers()

from retention.transformers.attention import power_retention_attention
from retention.transformers.cache import (
    PowerRetentionLayer,
    PowerRetentionStaticLayer,
    SlotCache,
)
from retention.transformers.configuration import (
    BrumbyConfig,
    PowerCoderConfig,
    RetentionConfig,
)
from retention.transformers.conversion import BlendSchedule, convert, convert_checkpoint, set_blend
from retention.transformers.modeling import (
    BrumbyForCausalLM,
    BrumbyForSequenceClassification,
    BrumbyForTokenClassification,
    BrumbyModel,
    PowerCoderForCausalLM,
    PowerCoderForSequenceClassification,
    PowerCoderForTokenClassification,
    PowerCoderModel,
    RetentionForCausalLM,
    RetentionForSequenceClassification,
    RetentionForTokenClassification,
    RetentionModel,
)

__all__ = [
    "BlendSchedule",
    "BrumbyConfig",
    "BrumbyForCausalLM",
    "BrumbyForSequenceClassification",
    "BrumbyForTokenClassification",
    "BrumbyModel",
    "PowerCoderConfig",
    "PowerCoderForCausalLM",
    "PowerCoderForSequenceClassification",
    "PowerCoderForTokenClassification",
    "PowerCoderModel",
    "PowerRetentionLayer",
    "PowerRetentionStaticLayer",
    "RetentionConfig",
    "RetentionForCausalLM",
    "RetentionForSequenceClassification",
    "RetentionForTokenClassification",
    "RetentionModel",
    "SlotCache",
    "convert",
    "convert_checkpoint",
    "power_retention_attention",
    "set_blend",
]
