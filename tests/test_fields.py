"""Limits that stand at a field: what `build` takes, what it refuses, and with which words."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kdq import config as kdq_config
from kdq import schema
from kdq.fields import ConfigError, Limits, build, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    above: float = field(1.0, above=0)
    share: float = field(0.0, at_least=0, below=1)
    count: int = field(1, at_least=1, at_most=8)
    many: tuple[int, ...] = field((), at_least=0, distinct=True)
    some: tuple[str, ...] = field(("x",), some=True)
    kind: str = field("a", one_of=("a", "b"))
    pattern: str = field("", pattern=True)
    scale: float | tuple[float, ...] = field(1.0, above=0, some=True)
    schedule: float | Mapping[str, Any] = field(0.0, at_least=0)
    named: Mapping[str, int] = field(default_factory=dict, folders=("plots",))
    path: str = field("", path=True)
    anything: Any = None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("above", 0, "here.above=0.0: expected more than 0"),
        ("share", 1, "here.share=1.0: expected 0 to below 1"),
        ("share", -1e-9, "here.share=-1e-09: expected 0 to below 1"),
        ("count", 0, "here.count=0: expected 1 to 8"),
        ("count", 9, "here.count=9: expected 1 to 8"),
        ("count", True, "here.count=True: expected int"),
        ("count", 2.0, "here.count=2.0: expected int"),
        ("count", 2**70, "here.count=1180591620717411303424: expected a number of 64 bits"),
        ("many", (3, -1), "here.many[1]=-1: expected at least 0"),
        ("many", (3, 3), "here.many=(3, 3): expected them all different"),
        ("some", (), "here.some is empty: expected one or more"),
        ("kind", "c", "unknown here.kind: 'c'; valid: a, b"),
        ("pattern", "(", "here.pattern='(' is no regular expression: missing )"),
        ("scale", (1.0, 0.0), "here.scale[1]=0.0: expected more than 0"),
        ("scale", (), "here.scale is empty"),
        ("schedule", -0.5, "here.schedule=-0.5: expected at least 0"),
        ("above", math.nan, "here.above=nan: expected a finite number"),
        ("above", math.inf, "here.above=inf: expected a finite number"),
        ("above", 1e300, "here.above=1e+300: expected a finite number, at most 3.4e+38"),
        ("above", 10**400, "expected a finite number, at most 3.4e+38"),
        ("above", "1", "here.above='1': expected float"),
        ("kind", "a\nb", "here.kind='a\\nb': holds the character '\\n'; expected one line"),
        ("kind", "a\x00", "holds the character '\\x00'"),
        ("kind", "a\udcff", "holds the character '\\udcff'"),
        ("kind", "a\u202eb", "holds the character '\\u202e'"),
        ("named", {"a b": 1}, "here.named.a b: that name is a folder"),
        ("named", {"../up": 1}, "that name is a folder"),
        ("named", {"": 1}, "that name is a folder"),
        ("named", {"x" * 101: 1}, "that name is a folder; expected up to 100"),
        ("named", {"plots": 1}, "the folder 'plots' would be kdq's own"),
        ("named", {"Plots": 1}, "the folder 'Plots' would be kdq's own"),
        ("named", {"CON": 1}, "a device's on Windows"),
        ("named", {"lpt1": 1}, "a device's on Windows"),
        ("named", {3: 1}, "here.named has the key 3: expected text"),
        ("anything", {"x": {1, 2}}, "here.anything.x={1, 2}: expected a number, a text, a list"),
        ("anything", [math.nan], "here.anything[0]=nan: expected a finite number"),
        ("anything", b"x", "here.anything=b'x': expected a number"),
        ("anything", {"x": "a\x1b[31m"}, "here.anything.x='a\\x1b[31m': holds the character"),
    ],
)
def test_a_value_beyond_the_limits_is_refused(name, value, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        build(Sample, {name: value}, "here")
    said = str(error.value)
    assert len(said) < 500
    said.encode()  # it can be printed, on one line
    assert said.isprintable()


def test_values_within_the_limits_are_taken():
    made = build(
        Sample,
        {
            "above": 1e-30,
            "share": 0,
            "count": 8,
            "many": [2, 0],
            "schedule": {"kind": "linear", "values": [1, -1]},
            "named": {"Con_1": 3},
            "anything": [1, {"a": [None, True]}],
            "path": "~/x",
        },
        "here",
    )
    assert made.many == (2, 0)
    assert made.anything == (1, {"a": (None, True)})
    assert made.path == os.path.expanduser("~/x") != "~/x"


def test_a_home_that_nobody_has_is_refused():
    with pytest.raises(ConfigError, match=r"here.path='~no-such-user/x': there is no user.*\./~no"):
        build(Sample, {"path": "~no-such-user/x"}, "here")


NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([2**31, 2**32, 2**63, 1e300, 3.4e38, 1e-320])
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.binary(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=2),
    ),
    max_leaves=6,
)
SECTIONS = [
    cls for cls in vars(schema).values() if dataclasses.is_dataclass(cls) and isinstance(cls, type)
]


# What fields without a default may hold.
WANTED = {
    "name": "digits",
    "model": "cnn",
    "arm": "x",
    "path": "x",
    "terms": {"kl": {"loss": "kl"}},
    "arms": ("x",),
    "seeds": (0,),
    "data": {"name": "digits"},
    "models": {"cnn": {"name": "cnn"}},
}


@settings(max_examples=100)
@given(st.data())
def test_every_section_takes_a_value_or_says_in_a_line_why_not(data):
    """Whatever is put at whatever field of the schema."""
    section = data.draw(st.sampled_from(SECTIONS))
    of_field = data.draw(st.sampled_from(dataclasses.fields(section)))
    value = data.draw(ANYTHING)
    wanted = {f.name: WANTED[f.name] for f in dataclasses.fields(section) if f.name in WANTED}
    if section is schema.Experiment:
        wanted["arms"] = {"x": {"model": "cnn"}}
    said = ""
    try:
        made = build(section, {**wanted, of_field.name: value}, "config")
        kdq_config.digest(made)  # it is JSON
    except ConfigError as error:
        said = str(error)
    assert said.isprintable()
    assert "is missing" not in said or isinstance(value, Mapping)


def test_words_for_limits():
    words = {
        "more than 0": Limits(above=0),
        "at least 1": Limits(at_least=1),
        "below 1": Limits(below=1),
        "at most 8": Limits(at_most=8),
        "more than 0 to below 1": Limits(above=0, below=1),
        "0 to 1": Limits(at_least=0, at_most=1),
    }
    assert {str(limits): limits for limits in words.values()} == words
