import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_core.data.blueprint import Blueprint, draw, keeps_track

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
TRIMMED = (
    "{% for m in messages %}{% set c = '<' + m['role'] + '>' + m['content'] | trim + '<end>' %}{{ c }}{% endfor %}"
)
AROUND = "{% for m in messages %}{{ ('[INST] ' + m['content'] + ' ').strip() ~ '<end>' }}{% endfor %}"
THINKS = (
    "{% for m in messages %}{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ '<' + m.role + '>' + m.content.lstrip('\n') }}{% endif %}<end>{% endfor %}"
)
STARTS = "{% for m in messages %}{% if m.content.startswith('#') %}!{% endif %}{{ m.content }}<end>{% endfor %}"
TRACKABLE = {"plain": PLAIN, "trimmed": TRIMMED, "around": AROUND, "thinks": THINKS, "starts": STARTS}
ROLES = ("user", "assistant")
WORDS = st.text(st.sampled_from("ab# \n\té</think>"), max_size=12)


def render(template: str, contents) -> str:
    messages = [{"role": role, "content": content} for role, content in zip(ROLES, contents, strict=True)]
    return ImmutableSandboxedEnvironment().from_string(template).render(messages=messages)


def blueprint(template: str) -> tuple[list[str], Blueprint | None]:
    marked = render(template, ["\ue000", "\ue001"]).replace("\ue001", "\ue000")
    pieces = marked.split("\ue000")
    return pieces, draw(pieces, lambda contents: render(template, contents))


@pytest.mark.parametrize("name", TRACKABLE)
@given(contents=st.tuples(WORDS, WORDS))
@settings(max_examples=150, deadline=None)
def test_what_a_blueprint_writes_is_what_the_template_writes(name: str, contents: tuple[str, str]):
    template = TRACKABLE[name]
    assert keeps_track(template)
    pieces, found = blueprint(template)
    assert found is not None
    altered = found.alter(contents)
    if altered is not None:
        written = pieces[0] + altered[0] + pieces[1] + altered[1] + pieces[2]
        assert written == render(template, contents)


def test_words_that_answer_a_question_differently_are_left_to_the_template():
    _, found = blueprint(THINKS)
    assert found is not None
    assert found.alter(["a", "\n\nb"]) == ["a", "b"]
    assert found.alter(["a", "x</think>b"]) is None


def test_blank_words_are_left_to_the_template():
    _, found = blueprint(PLAIN)
    assert found is not None
    assert found.alter([" ", "b"]) is None


@pytest.mark.parametrize(
    "looks",
    ["m.content.split('x')[0]", "m.content[0]", "m.content | length", "m.content.strip('<')",
     "m.content.replace('a', 'b')", "('a' + m.content).startswith('ab')"],
)  # fmt: skip
def test_a_template_that_looks_at_each_word_has_no_blueprint(looks: str):
    assert (
        blueprint("{% for m in messages %}{% if " + looks + " %}{% endif %}{{ m.content }}<end>{% endfor %}")[1] is None
    )


def test_a_template_that_escapes_words_has_no_blueprint():
    template = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    assert draw(['"', '""', '"'], lambda contents: render(template, contents)) is None


@pytest.mark.parametrize(
    "template",
    [
        "{% macro say(c) %}{{ c }}{% endmacro %}{{ say(messages[0].content) }}",
        "{% set c %}{{ messages[0].content }}{% endset %}{{ c }}",
        "{% set c = 'a' ~ messages[0].content %}{{ c }}",
        "{{ ['a', messages[0].content] | join }}",
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content | replace('a', 'b') }}",
        "{{ ', '.join([messages[0].content]) }}",
        "{{ '%s' % messages[0].content }}",
        "{% if messages[0].content | tojson == 'a' %}b{% endif %}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    ],
)
def test_a_template_that_makes_new_texts_of_messages_is_not_tracked(template: str):
    assert not keeps_track(template)
