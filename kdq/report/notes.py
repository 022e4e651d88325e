"""Notes below tables, as `template/notes.txt` words them, and the templates of reports."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2

from kdq.evaluate.statistics import SEEDS
from kdq.record import ArmRecord
from kdq.report import aggregate, cells
from kdq.report import metric as metrics
from kdq.report.aggregate import Row
from kdq.report.workdirs import SCORES


def environment(**options: Any) -> jinja2.Environment:
    """Returns what renders `kdq/report/template`; a value that is not there is an error."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("kdq.report", "template"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    templates.globals |= {"aggregate": aggregate, "cells": cells, "metrics": metrics}
    templates.globals |= {"isnan": math.isnan, "versions_of": versions_of, "digests_of": digests_of}
    return templates


@functools.cache
def texts() -> Any:
    """Returns the macros of notes.txt, as functions that return plain text."""
    templates = environment(autoescape=False, finalize=lambda v: " ".join(str(v).splitlines()))
    templates.globals |= {"SEEDS": SEEDS, "SCORES": SCORES}
    return templates.get_template("notes.txt").module


def notes(table: Sequence[Row], records: Sequence[ArmRecord]) -> list[str]:
    """Returns one paragraph a note, as plain text."""
    lines = texts().notes(table, records, against_uniform(records)).split("\n")
    return [line for line in lines if line]


def coverage(compared: Iterable[Any]) -> str:
    """Returns what the intervals of rows or findings are over, in a few words."""
    over = {each.difference.over for each in compared if each.difference is not None}
    if over <= {SEEDS}:
        return "over seeds"
    return f"over seeds and test examples{', where scores of these are' if SEEDS in over else ''}"


def against_uniform(records: Sequence[ArmRecord]) -> str:
    """Returns which searches chose the same bits as the uniform search they are compared with.

    "" if none is compared.
    """
    searches: dict[tuple[str, str], dict[int, bool]] = {}
    for record in records:
        if uniform := record.search.get("uniform"):
            names = record.search["name"], uniform["name"]
            searches.setdefault(names, {})[record.seed] = uniform["same"]
    parts = []
    for (name, uniform), by_seed in searches.items():
        for same, policy in ((True, "the same policy as"), (False, "another policy than")):
            if seeds := [str(seed) for seed in sorted(by_seed) if by_seed[seed] == same]:
                word = "seed" if len(seeds) == 1 else "seeds"
                parts.append(f"{name} found {policy} {uniform} with {word} {', '.join(seeds)}")
    return f"{'; '.join(parts)}." if parts else ""


def versions_of(records: Sequence[ArmRecord]) -> dict[str, list[str]]:
    """Returns {package: versions, in order of appearance}."""
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for package, version in record.versions.items():
            versions.setdefault(package, {})[version] = None
    return {package: list(each) for package, each in versions.items()}


def digests_of(records: Sequence[ArmRecord]) -> str:
    """Returns the digest that most arms have, then each other one with its arms."""
    arms: dict[str, dict[str, None]] = {}
    for record in records:
        arms.setdefault(record.config_digest or "not recorded", {})[record.arm] = None
    most, *others = sorted(arms, key=lambda digest: -len(arms[digest]))
    return ", but ".join([most, *(f"{digest} for {', '.join(arms[digest])}" for digest in others)])
