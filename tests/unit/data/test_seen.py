import hashlib

from qlora_core.data import seen
from qlora_core.data.seen import SeenKeys


def key(at: int) -> bytes:
    return hashlib.blake2b(str(at).encode(), digest_size=16).digest()


def test_a_key_is_new_once_however_many_came_between(monkeypatch):
    monkeypatch.setattr(seen, "RECENT_KEYS", 10)
    keys = SeenKeys()
    assert all(keys.add(key(at)) for at in range(95))
    assert not any(keys.add(key(at)) for at in range(95))
    assert keys.add(key(95))
