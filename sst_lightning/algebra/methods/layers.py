"""Layer-wise weights of the safety adapter (the original's V3)."""

import math
import re
from collections.abc import Mapping

from sst_lightning.algebra.errors import SSTMergeError

LAYER_PRESETS: dict[str, dict[str, float]] = {
    "safety_first": {"lm_head": 1.0, "attn": 1.0, "mlp": 0.8},
    "balanced": {"lm_head": 0.8, "attn": 0.6, "mlp": 0.4},
    "utility_first": {"lm_head": 0.5, "attn": 0.3, "mlp": 0.2},
    "minimal": {"lm_head": 0.5, "attn": 0.1, "mlp": 0.1},
}
"""Weight by pattern: head, attention and feed-forward modules."""


def layer_patterns(weights: str | Mapping[str, float] | None) -> dict[str, float]:
    """Return patterns and weights; an empty result weighs every module 1.

    Args:
        weights: name of a preset, or regular expressions searched in module names with weights.

    Raises:
        SSTMergeError: unknown preset, invalid pattern or weight.
    """
    if weights is None:
        return {}
    if isinstance(weights, str):
        if weights not in LAYER_PRESETS:
            raise SSTMergeError(
                f"layer_weights '{weights}' is not a preset: use {', '.join(LAYER_PRESETS)}, or a "
                "mapping of module patterns to weights"
            )
        return LAYER_PRESETS[weights]
    for pattern, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise SSTMergeError(f"layer_weights: the weight of '{pattern}' is {weight}, not ≥ 0")
        try:
            re.compile(pattern)
        except re.error as error:
            raise SSTMergeError(
                f"layer_weights: '{pattern}' is not a regular expression"
            ) from error
    return dict(weights)


def layer_weight(module: str, patterns: Mapping[str, float]) -> float:
    """Return the weight of the first pattern found in ``module``; 1 if there is none."""
    for pattern, weight in patterns.items():
        if re.search(pattern, module):
            return weight
    return 1.0
