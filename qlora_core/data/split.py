"""Which side of the split a row is on."""

import hashlib


def in_evaluation(key: str, seed: int, fraction: float) -> bool:
    """Whether rows with this key are kept for evaluation.

    It depends on nothing but key and seed, so rows that are added later never move one that was there.
    """
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
