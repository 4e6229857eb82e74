"""What every part of a recipe has in common."""

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """A frozen part of a recipe that names the nearest key when it meets an unknown one."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _suggest_nearest_key(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for key in value:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean `{near[0]}`?" if near else f"allowed: {', '.join(cls.model_fields)}"
                raise PydanticCustomError("unknown_key", "unknown key `{key}`; {hint}", {"key": key, "hint": hint})
        return value
