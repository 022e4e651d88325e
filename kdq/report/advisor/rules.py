"""Methods, constraints and rules of the advisor: the tables of `rules.toml`."""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

SEEDS = 3  # fewer than this make no claim between arms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One of the answers that the advisor can give."""

    name: str
    says: str  # what one does
    arm: str  # code for it
    how: str = "Add to config.arms, fill in, and run launch/compress.py:"
    # For the page, where methods stand side by side; "" of one that does not.
    title: str = ""
    definition: str = ""
    goal: str = ""
    when: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirement:
    """One kind of constraint, and what is said of arms that fail it or can't be judged by it."""

    name: str
    unit: str = ""  # "" where it is no number, or in the unit of the metric
    fails: str  # of an arm, after its name
    unknown: str  # what the records lack
    rerun: bool = False  # whether running the experiment gives it
    measure: str = ""  # the flags for that


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A question that a difference between two methods answers; the metric of `a` against `b`.

    The arms of a pair have equal bits and equal parameters unless said otherwise, are of one
    experiment, and are each the best of their method on validation; the difference is on test.
    """

    name: str
    question: str  # under which it is answered: a key of QUESTIONS
    a: str  # a method
    b: str  # a method, or "start": the float arm that `a` starts from, "teacher", or "uniform"
    above: str  # said if all of the interval says that `a` is better
    below: str  # if all of it says that `b` is
    level: str  # if it contains 0 and lies within the metric's `level` of it
    papers: Sequence[str]  # arXiv ids
    results: Sequence[str] = ()  # files of docs/results in which this project measured it
    caution: str = ""  # what else differs between such arms

    @property
    def source(self) -> str:
        """Where the rule comes from, in words."""
        papers = [f"arXiv:{paper}" for paper in self.papers]
        return "; ".join([*papers, *(f"docs/results/{file}" for file in self.results)])


_TABLES = tomllib.loads(Path(__file__).with_name("rules.toml").read_text(encoding="utf-8"))
METHODS = {m["name"]: Method(**m) for m in _TABLES["method"]}  # from the simplest on
REQUIREMENTS = {r["name"]: Requirement(**r) for r in _TABLES["requirement"]}
QUESTIONS: Mapping[str, str] = _TABLES["questions"]
RULES = tuple(Rule(**rule) for rule in _TABLES["rule"])
# The bits that a device multiplies or unpacks, by what --integers says of it.
INTEGERS: Mapping[str, frozenset[int]] = {
    "none": frozenset(),  # floats only
    "8": frozenset({8}),
    "sub8": frozenset(range(1, 9)),  # packed weights of fewer bits, too
}
