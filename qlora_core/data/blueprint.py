"""Find out what a chat template does with any words, so that rows need no rendering.

A template is run once with texts that remember what they are asked (`"</think>" in content`, `content.startswith(...)`)
and where they are stripped. Its path depends on nothing else, so for all words that give the same answers it writes the
same pieces around them. A template that looks in a way that cannot be asked again, such as `content.split(...)`, has no
blueprint, and its rows are rendered one by one.
"""

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any, NamedTuple, NoReturn, Self

from jinja2 import TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

Alteration = Callable[[str], str]
ALTERATIONS: tuple[Alteration, ...] = (
    str,
    str.strip,
    str.lstrip,
    str.rstrip,
    methodcaller("lstrip", "\n"),
    methodcaller("rstrip", "\n"),
    methodcaller("strip", "\n"),
)
"""What templates do to the white space around a message; tried in this order."""
HARD = "'\"<&\\{}%ÀbC\n~"
"""Filters that escape or change letters cannot leave this as it is."""
LOSES_TRACK = (nodes.Macro, nodes.CallBlock, nodes.AssignBlock, nodes.FilterBlock)
"""What they write is a new text, which no longer remembers."""
FILTERS = frozenset({"trim", "tojson", "length", "count", "default", "d", "list", "first", "last", "items"})
"""Those that keep a message as it is, or ask it."""
COPYING_METHODS = frozenset({"join", "format", "format_map", "replace"})
"""Methods of one text that copy another."""


class UnpredictableError(Exception):
    """The template looks into a message in a way that other words may answer otherwise."""


class Condition(NamedTuple):
    """A question that the template asked about a message, and the answer that it got."""

    position: int
    alteration: Alteration
    method: Callable[..., Any]
    arguments: tuple[Any, ...]
    answer: Any

    def holds(self, content: str) -> bool:
        """Whether these words give the same answer."""
        return bool(self.method(self.alteration(content), *self.arguments) == self.answer)


class Blueprint(NamedTuple):
    """How a template writes conversations of one sequence of roles."""

    alterations: tuple[Alteration, ...]
    """What happens to the white space of each message."""
    conditions: tuple[Condition, ...]

    def alter(self, contents: Sequence[str]) -> list[str] | None:
        """The words as the template writes them; None if only the template itself can say."""
        if any(not content or content.isspace() for content in contents):
            return None
        if not all(condition.holds(contents[condition.position]) for condition in self.conditions):
            return None
        return [alteration(content) for alteration, content in zip(self.alterations, contents, strict=True)]


def draw(pieces: Sequence[str], render: Callable[[Sequence[str]], str]) -> Blueprint | None:
    """The blueprint of what `render` does with contents, if there is one.

    Args:
        pieces: what stands between the contents, one more than they are.
        render: writes texts in place of the contents.
    """
    count = len(pieces) - 1
    conditions: list[Condition] = []
    plain = [f"\ue000{at}{HARD}{at}\ue001" for at in range(count)]
    spaced = [f"\n \t{text}\t \n" for text in plain]
    try:
        if render([_Traced.of(text, at, conditions) for at, text in enumerate(plain)]) != _join(pieces, plain):
            return None
        written = render([_Traced.of(text, at, []) for at, text in enumerate(spaced)])
    except UnpredictableError:
        return None
    alterations = _alterations(written, pieces, spaced)
    return None if alterations is None else Blueprint(alterations, tuple(conditions))


def keeps_track(template: str) -> bool:
    """Whether all that a template writes about a message goes through the message itself."""
    try:
        tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:
        return False  # it uses extensions that capture what is written
    if next(tree.find_all(LOSES_TRACK), None) is not None:
        return False
    if any(found.name not in FILTERS for found in tree.find_all(nodes.Filter)):
        return False
    if any(found.attr in COPYING_METHODS for found in tree.find_all(nodes.Getattr)):
        return False
    if any(isinstance(found.left, nodes.Const) for found in tree.find_all(nodes.Mod)):
        return False
    written = {id(part) for output in tree.find_all(nodes.Output) for part in output.nodes}
    made = [*tree.find_all(nodes.Concat), *(f for f in tree.find_all(nodes.Filter) if f.name == "tojson")]
    return all(id(text) in written for text in made)


def _join(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return pieces[0] + "".join(content + piece for content, piece in zip(contents, pieces[1:], strict=True))


def _alterations(written: str, pieces: Sequence[str], contents: Sequence[str]) -> tuple[Alteration, ...] | None:
    chosen = []
    at = len(pieces[0])
    for content, piece in zip(contents, pieces[1:], strict=True):
        fitting = (alter for alter in ALTERATIONS if written.startswith(alter(content) + piece, at))
        alteration = next(fitting, None)
        if alteration is None:
            return None
        chosen.append(alteration)
        at += len(alteration(content) + piece)
    altered = [alteration(content) for alteration, content in zip(chosen, contents, strict=True)]
    return tuple(chosen) if written == _join(pieces, altered) else None


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise UnpredictableError


class _Joined(str):
    """A message with something around it: it may be written and stripped, but not looked at."""

    def __bool__(self) -> bool:
        return True  # a blueprint is not used for words that are blank

    def __add__(self, other: str) -> "_Joined":
        return _Joined(str.__add__(self, other))

    def __radd__(self, other: str) -> "_Joined":
        return _Joined(str.__add__(other, self))

    def strip(self, chars: str | None = None) -> "_Joined":
        return self._stripped("strip", chars)

    def lstrip(self, chars: str | None = None) -> "_Joined":
        return self._stripped("lstrip", chars)

    def rstrip(self, chars: str | None = None) -> "_Joined":
        return self._stripped("rstrip", chars)

    def _stripped(self, how: str, chars: str | None) -> "_Joined":
        return _Joined(_alteration(how, chars)(str(self)))


def _alteration(how: str, chars: str | None) -> Alteration:
    """Other characters than these would not be noticed in texts with white space around them."""
    return methodcaller(how, chars) if chars in (None, "\n") else _refuse()


class _Traced(_Joined):
    """A message that notes what it is asked."""

    _position: int
    _conditions: list[Condition]
    _altered: Alteration

    @classmethod
    def of(cls, text: str, position: int, conditions: list[Condition], altered: Alteration = str) -> Self:
        traced = cls(text)
        traced._position, traced._conditions, traced._altered = position, conditions, altered
        return traced

    def _stripped(self, how: str, chars: str | None) -> _Joined:
        if self._altered is not str:
            _refuse()
        alter = _alteration(how, chars)
        return _Traced.of(alter(str(self)), self._position, self._conditions, alter)


def _asking(method: Callable[..., Any]) -> Callable[..., Any]:
    def ask(self: _Traced, *arguments: Any) -> Any:
        if any(isinstance(argument, _Joined) for argument in arguments):
            _refuse()
        answer = method(str(self), *arguments)
        self._conditions.append(Condition(self._position, self._altered, method, arguments, answer))
        return answer

    return ask


_OF_ANY_OBJECT = frozenset(dir(object)) - {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"}
_KNOWN = _OF_ANY_OBJECT - {"__format__", "__repr__"} | {"__getnewargs__", "__add__", "strip", "lstrip", "rstrip"}
for _name in set(dir(str)) - _KNOWN:
    setattr(_Joined, _name, _refuse)
for _name in ("__contains__", "__eq__", "__ne__", "startswith", "endswith"):
    setattr(_Traced, _name, _asking(getattr(str, _name)))
