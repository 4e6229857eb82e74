"""Recipes, and names that end up in paths, filters and locks."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_core.hub.resolve import resolve
from qlora_core.recipe import load_recipe

GOOD: dict[str, Any] = {
    "name": "x",
    "model": {"source": "local", "path": "model"},
    "data": {"rows": [{"source": "local", "path": "rows.json"}], "seq_len_tokens": 128},
}
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
YAML = {
    "a python object": b"name: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    "a python name": b"name: !!python/name:os.system\n",
    "a python module": b"!!python/module:os\n",
    "a new tag": b"!<tag:evil,2026:x> {name: x}\n",
    "binary": b"name: !!binary not-base64!\n",
    "a set": b"name: !!set {a, b}\n",
    "an ordered map": b"!!omap [name: x]\n",
    "pairs": b"name: !!pairs [a: 1, a: 2]\n",
    "a bomb of aliases": BOMB.encode(),
    "a bomb of aliases in a value": (BOMB + "name: *a11\n").encode(),
    "a bomb of merges": b"a: &a {b: 1}\n" + b"c: {<<: [*a, *a, *a]}\n",
    "a list in itself": b"name: &a [*a]\n",
    "a mapping in itself": b"&a {name: *a}\n",
    "5000 open brackets": b"name: " + b"[" * 5000,
    "5000 nested lists": b"name: " + b"[" * 5000 + b"]" * 5000,
    "5000 nested mappings": b"{a: " * 5000 + b"1" + b"}" * 5000,
    "a number of 5000 digits": b"name: " + b"9" * 5000,
    "a number of base 60": b"seed: 190:20:30\n",
    "a date that is none": b"name: 2026-99-99\n",
    "a time zone that is none": b"name: 2026-01-01 00:00:00 +99:99\n",
    "infinity as a key": b"? .inf\n: 1\n",
    "a list as a key": b"? [1, 2]\n: 1\n",
    "a mapping as a key": b"? {a: 1}\n: 1\n",
    "an unknown alias": b"name: *nobody\n",
    "the same key twice": b"name: x\nname: y\n",
    "a zero byte": b"name: a\0b\n",
    "control characters": b"name: \x01\x02\x1b[31m\n",
    "no UTF-8": b"name: \xff\xfe\xfa\n",
    "UTF-16": "name: x\n".encode("utf-16"),
    "UTF-32": "name: x\n".encode("utf-32"),
    "half a surrogate": b'name: "\\ud800"\n',
    "nothing": b"",
    "a list": b"- name\n",
    "a scalar": b"42\n",
    "null": b"~\n",
    "two documents": b"name: x\n---\nname: y\n",
    "an unclosed quote": b'name: "x\n' * 100,
    "tabs": b"name:\tx\n\tmodel: y\n",
    "two megabytes": b"# " + b"x" * 2_000_000,
    "100,000 keys": b"".join(b"k%d: 1\n" % n for n in range(100_000)),
    "a directive": b"%YAML 9.9\n---\nname: x\n",
    "a directive of tags": b"%TAG ! tag:yaml.org,2002:python/\n---\nname: !object/apply:os.system [id]\n",
}
VALUES: dict[str, dict[str, Any]] = {
    f"name {name!r}"[:60]: {"name": name}
    for name in (
        *("../../x", "a/b", "..", "", ".", "x" * 1000, "a\0b", "a\nb", "x' OR '1'='1", "{{ 7*7 }}", "%2e%2e", "~root"),
        *("\u202egnp.exe", "$(id)", "`id`", "-rf", 7, None, ["x"], {"a": 1}),
    )
}
VALUES |= {
    f"repository {repo!r}": {"model": {"source": "huggingface", "repo": repo}}
    for repo in (
        "../x/y",
        "a/../../b",
        "a/b?x=1",
        "a/b#c",
        "http://evil/a",
        "a/b/c",
        "a//b",
        "a/..",
        "/etc/passwd",
        "a",
    )
}
VALUES |= {
    f"package {package!r}": {"model": {"source": "package", "package": package, "sha256": "0" * 64, "file": "a"}}
    for package in ("x==1;rm -rf /", "../x==1", "x @ http://evil", "-r==1", "x==1 --pre", "x==../..")
}
VALUES |= {
    "a device as the model": {"model": {"source": "local", "path": "/dev/zero"}},
    "the memory of the process as the model": {"model": {"source": "local", "path": "/proc/self/mem"}},
    "a device as rows": {"data": {"rows": [{"source": "local", "path": "/dev/zero"}], "seq_len_tokens": 64}},
    "a pattern of everything": {"data": {"rows": [{"source": "local", "path": "/proc/1/**"}], "seq_len_tokens": 64}},
    "a path with a zero byte": {"model": {"source": "local", "path": "a\0b"}},
    "a path of 100,000 characters": {"model": {"source": "local", "path": "x/" * 50_000}},
    "a device as DeepSpeed settings": {"train": {"deepspeed": "/dev/zero"}},
    "DeepSpeed settings that are a folder": {"train": {"deepspeed": "."}},
    "rows of 10^12 tokens": {"data": {**GOOD["data"], "seq_len_tokens": 10**12}},
    "10^308 epochs": {"train": {"epochs": 1e308}},
    "10^9 processes": {"train": {"processes": 10**9}},
    "a rank of 10^12": {"train": {"lora": {"rank": 10**12}}},
    "a rank below nothing": {"train": {"lora": {"rank": -1}}},
    "a learning rate of infinity": {"train": {"learning_rate": float("inf")}},
    "a seed of 2^64": {"seed": 2**64},
    "100,000 sources": {"data": {"rows": [{"source": "local", "path": f"{n}"} for n in range(100_000)]}},
    "code of a branch": {"model": {"source": "huggingface", "repo": "a/b", "trust_remote_code": True}},
    "code that nothing pins": {"model": {"source": "local", "path": "m", "trust_remote_code": True}},
    "a metric by path": {"evaluation": {"metrics": ["../../evil:run"]}},
    "a gate on nothing": {"promotion": {"gates": [{"metric": "__class__", "threshold": float("nan")}]}},
}
OVERRIDES = ("=", "a", "..=1", "name.x.y=1", "data.rows.99=1", "data.rows.-1=1", "name=" + "[" * 5000, "a=&a [*a]")
OVERRIDES += ("name=!!python/name:os.system", "__class__.x=1", "data.rows.0.path=/dev/zero", "name=2026-99-99")
NAMES = ("x' OR '1'='1", "../../z", "a@b@c", "", "@champion", "x@" + "9" * 40, "x@../..", "y" * 5000, "a\nb", "'", '"')
NAMES += ("a/b", "a:b", "%00", "🙂", "x@champion' --")


def inputs(folder: Path) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    for name, text in YAML.items():
        yield "recipe", name, lambda place, text=text: _load(place, text)
    for name, changes in VALUES.items():
        text = json.dumps({**GOOD, **changes}).encode()
        yield "recipe", name, lambda place, text=text: _load(place, text)
    yield "recipe", "a pipe", _pipe
    for override in OVERRIDES:
        good = json.dumps(GOOD).encode()
        yield "override", override[:40], lambda place, o=override, good=good: _load(place, good, (o,))
    _open_registry(folder).names()  # a new database takes seconds
    for name in NAMES:
        yield "registry name", name[:40], lambda place, name=name: _ask_registry(folder, name)
        yield "lock name", name[:40], lambda place, name=name: _lock(place, name)


def _load(place: Path, text: bytes, overrides: tuple[str, ...] = ()) -> None:
    path = place / "recipe.yaml"
    path.write_bytes(text)
    recipe = load_recipe(path, overrides)
    for source, role in ((recipe.model, "model"), *((rows, "data") for rows in recipe.data.rows[:3])):
        if source.source == "local":
            resolve(source, role, place / "downloads")  # type: ignore[arg-type]


def _pipe(place: Path) -> None:
    os.mkfifo(place / "recipe.yaml")
    load_recipe(place / "recipe.yaml")


def _open_registry(folder: Path) -> Any:
    from tasks.registry import ModelRegistry
    from tasks.settings import Settings

    home = folder / "registry"
    (home / "mlflow").mkdir(parents=True, exist_ok=True)
    return ModelRegistry(Settings(home=home))


def _ask_registry(folder: Path, name: str) -> None:
    from tasks.failures import explain

    registry = _open_registry(folder)
    try:
        registry.resolve(name)
    except Exception as error:  # as the command does
        raise explain(error, registry.settings.mlflow_uri) or error from error


def _lock(place: Path, name: str) -> None:
    from tasks.locks import registry_lock
    from tasks.settings import Settings

    with registry_lock(Settings(home=place), name):
        pass
