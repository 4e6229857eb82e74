"""How many tokens a model can read."""

from typing import Any

EXTENDING = frozenset({"linear", "dynamic", "yarn"})
"""Kinds of rope scaling that read `factor` times as many tokens as the model was first trained on."""


def context_tokens(config: Any) -> int | None:
    """Longest row that a model of this config can read; None where positions set no limit, as in ALiBi or Mamba.

    Some configs give the length after their rope scaling and some the one before it: the larger one counts. Sliding
    windows do not matter, since they limit how far a token looks and not how long a row is.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if not limit or kind not in EXTENDING:
        return limit or None
    trained = scaling.get("original_max_position_embeddings") or limit
    return max(limit, int(trained * scaling.get("factor", 1)))
