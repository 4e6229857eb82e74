"""Which side of the split a row is on, and which rows of a source are used."""

import hashlib


def in_evaluation(key: str, seed: int, fraction: float) -> bool:
    """Whether rows with this key are kept for evaluation.

    It depends on nothing but key and seed, so rows that are added later never move one that was there.
    """
    return _place(f"{seed}:{key}") < fraction


def copies(key: str, weight: float) -> int:
    """How often a row is used if all rows together are to be used `weight` times; it depends on the key alone."""
    whole = int(weight)
    return whole + (_place(f"weight:{key}") < weight - whole)


def _place(text: str) -> float:
    """A number from 0 to 1 that looks drawn by chance."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
