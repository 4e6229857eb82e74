"""The README in Chinese tells the same to type as the README: a change of one alone fails here."""

import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = ((CHECKOUT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?:^ {4}\S.*\n)+", re.M)
COMMENT = re.compile(r"\s+# .*$", re.M)
"""Translated, so left out."""
COMMAND = re.compile(r"`((?:\.venv/bin/)?(?:qlora|make|mlflow|python|pip|transformers) [^`]+)`")
LINK = re.compile(r"\]\(([^)]+)\)")
HEADING = re.compile(r"^#+(?= )", re.M)


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of fenced blocks, then the indented ones, without comments."""
    indented = [("", block) for block in INDENTED.findall(FENCED.sub("", text))]
    return [(language, COMMENT.sub("", content)) for language, content in [*FENCED.findall(text), *indented]]


def commands(text: str) -> list[str]:
    """Inline code that can be typed, sorted, since a sentence may have another order."""
    return sorted(" ".join(command.split()) for command in COMMAND.findall(FENCED.sub("", text)))


def links(text: str) -> list[str]:
    return [link for link in LINK.findall(text) if link not in ("README.md", "README.zh-CN.md")]


@pytest.mark.parametrize("part", [blocks, commands, links, HEADING.findall])
def test_both_readmes_have_the_same(part):
    assert part(CHINESE) == part(ENGLISH)
    assert part(ENGLISH), "nothing was compared"


def test_each_readme_links_to_the_other():
    assert "(README.zh-CN.md)" in ENGLISH
    assert "(README.md)" in CHINESE
