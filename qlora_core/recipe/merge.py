"""What a user writes about merging."""

from typing import Annotated, Literal

from pydantic import Field

from qlora_core.recipe.part import Part


class MergeRecipe(Part):
    """Merge: the adapter into the unquantized base."""

    dtype: Literal["auto", "base", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: the base's dtype; where rounding to it costs a measurable part of what training gained, float16 if every
    value fits, else float32."""
    max_shard_mb: Annotated[int, Field(ge=1)] = 2048
