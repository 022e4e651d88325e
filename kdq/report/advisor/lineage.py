"""What an arm builds on: which training, whether labels, whether a teacher.

A workdir's config.json says it. Without one it is inferred from what each arm is compared with
("reference"), and marked as inferred.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kdq.report import Record

QUANTIZED = ("PTQ", "QAT", "QAD")
TAUGHT = ("KD", "QAD")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lineage:
    """What one arm needs; the teacher's own training is never counted, it is what one has."""

    start: str | None  # the float arm whose weights it starts from; None for fresh or unknown ones
    trained: tuple[str, ...]  # arms that have to be trained for it, itself included
    known: bool  # whether a config says so, and not a guess from references
    teacher: bool  # whether a teacher takes part, or is itself what is compressed
    labels: bool | None  # whether training needs labels; None: the records do not say
    distilled: bool  # whether what it starts from was taught
    control: bool = False  # a deliberately spoiled teacher: for science, not for use


def of_config(config: Mapping[str, Any], arm: str) -> Lineage:
    """From the config.json of a workdir."""
    arms, main = config["arms"], config["teacher"]
    chain = [arm]
    while chain[-1] != main and arms[chain[-1]].get("init"):
        chain.append(arms[chain[-1]]["init"])
    trained = [name for name in chain if name != main and arms[name].get("epochs")]
    kinds = [_teacher_kind(config, name) for name in chain if name != main]
    floats = [name for name in chain[1:] if not arms[name].get("bits")]
    return Lineage(
        start=floats[0] if floats else None,
        trained=tuple(trained),
        known=True,
        teacher=main in chain or any(k not in ("", "moving_average", "peer") for k in kinds),
        labels=any(_labels(config, name) for name in trained),
        distilled=any(k for k in kinds[1:]),
        control="shuffled" in kinds,
    )


def _teacher_kind(config: Mapping[str, Any], arm: str) -> str:
    """ "" for no teacher, "arm", or the kind of one of the config's `teachers`."""
    name = config["arms"][arm].get("teacher")
    if not name:
        return ""
    return config.get("teachers", {}).get(name, {}).get("kind", "arm")


def _labels(config: Mapping[str, Any], arm: str) -> bool:
    """Whether the loss of a trained arm has the task in it; a schedule may, so it counts."""
    one = config["arms"][arm]
    if not one.get("teacher"):
        return True
    return config["distill"][one["distill"]].get("task", 0.1) != 0


def of_references(arms: Mapping[str, Record], arm: str) -> Lineage:
    """From the records of an experiment alone: `arms` has one of each arm."""
    own = arms[arm]
    start = _start(arms, arm) if own["kind"] in QUANTIZED else None
    from_teacher = own["kind"] == "teacher" or (start and arms[start]["kind"] == "teacher")
    distilled = start is not None and arms[start]["kind"] == "KD"
    trained = [name for name in (arm, start) if name and arms[name]["kind"] != "teacher"]
    return Lineage(
        start=start,
        trained=tuple(name for name in trained if arms[name].get("steps", 1)),
        known=own["kind"] == "teacher",
        teacher=bool(from_teacher) or own["kind"] in TAUGHT or distilled,
        labels=_inferred_labels([arms[name]["kind"] for name in (arm, start) if name]),
        distilled=distilled,
    )


def _start(arms: Mapping[str, Record], arm: str) -> str | None:
    """The first float arm of the same parameters on the way along the references."""
    seen, name = {arm}, arms[arm].get("reference")
    while name in arms and name not in seen:
        if arms[name]["kind"] not in QUANTIZED:
            same = arms[name].get("params") == arms[arm].get("params")
            return name if same else None
        seen.add(name)
        name = arms[name].get("reference")
    return None


def _inferred_labels(kinds: Sequence[str]) -> bool | None:
    # A recipe may mix the labels in or not, and where QAD starts no reference tells.
    if "KD" in kinds or "QAD" in kinds or kinds == ["PTQ"]:
        return None
    return "labels" in kinds or "QAT" in kinds
