"""What a user writes about merging."""

from typing import Annotated, Literal

from pydantic import Field

from qlora_core.recipe.part import Part


class MergeRecipe(Part):
    """Merge: the adapter into the unquantized base."""

    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    max_shard_mb: Annotated[int, Field(ge=1)] = 2048
