"""What people can be told about."""

from enum import StrEnum


class Occasion(StrEnum):
    """How a retraining, or the wait for a person's word, can end."""

    FAILED = "failed"
    REJECTED = "rejected"
    PROMOTED = "promoted"
    AWAITING_APPROVAL = "awaiting-approval"
