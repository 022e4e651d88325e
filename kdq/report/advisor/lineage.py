"""Lineages of arms: which training, labels and teachers each builds on.

A workdir's config.json says it. Without one it is inferred from what each arm is compared with
("reference"), and marked as inferred.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kdq.record import ArmRecord

QUANTIZED = ("PTQ", "QAT", "QAD")
TAUGHT = ("KD", "QAD")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lineage:
    """Needs of one arm; the teacher's own training is never counted, it is what one has."""

    start: str | None  # the float arm whose weights it starts from; None for fresh or unknown ones
    trained: tuple[str, ...]  # arms that have to be trained for it, itself included
    known: bool  # whether a config says so, and not a guess from references
    teacher: bool  # whether a teacher takes part, or is itself what is compressed
    labels: bool | None  # whether training needs labels; None: the records do not say
    distilled: bool  # whether what it starts from was taught
    control: bool = False  # a deliberately spoiled teacher: for science, not for use


def from_config(config: Mapping[str, Any], arm: str) -> Lineage:
    """Returns the lineage that the config.json of a workdir says."""
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
        labels=any(_has_labels(config, name) for name in trained),
        distilled=any(k for k in kinds[1:]),
        control="shuffled" in kinds,
    )


def _teacher_kind(config: Mapping[str, Any], arm: str) -> str:
    """Returns "" for no teacher, "arm", or the kind of one of the config's `teachers`."""
    name = config["arms"][arm].get("teacher")
    if not name:
        return ""
    return config.get("teachers", {}).get(name, {}).get("kind", "arm")


def _has_labels(config: Mapping[str, Any], arm: str) -> bool:
    """Returns whether the loss of a trained arm has the task in it; a schedule may: it counts."""
    fields = config["arms"][arm]
    if not fields.get("teacher"):
        return True
    return config["distill"][fields["distill"]].get("task", 0.1) != 0


def from_references(arms: Mapping[str, ArmRecord], arm: str) -> Lineage:
    """Infers the lineage from the records of an experiment alone: `arms` has one of each arm."""
    kind = arms[arm].kind
    start = _infer_start(arms, arm) if kind in QUANTIZED else None
    from_teacher = kind == "teacher" or (start and arms[start].kind == "teacher")
    distilled = start is not None and arms[start].kind == "KD"
    trained = [name for name in (arm, start) if name and arms[name].kind != "teacher"]
    return Lineage(
        start=start,
        trained=tuple(name for name in trained if arms[name].steps != 0),
        known=kind == "teacher",
        teacher=bool(from_teacher) or kind in TAUGHT or distilled,
        labels=_infer_labels([arms[name].kind for name in (arm, start) if name]),
        distilled=distilled,
    )


def _infer_start(arms: Mapping[str, ArmRecord], arm: str) -> str | None:
    """Returns the first float arm of the same parameters on the way along the references."""
    seen, name = {arm}, arms[arm].reference
    while name in arms and name not in seen:
        if arms[name].kind not in QUANTIZED:
            return name if arms[name].params == arms[arm].params else None
        seen.add(name)
        name = arms[name].reference
    return None


def _infer_labels(kinds: Sequence[str]) -> bool | None:
    # A recipe may mix the labels in or not, and where QAD starts no reference tells.
    if "KD" in kinds or "QAD" in kinds or kinds == ["PTQ"]:
        return None
    return "labels" in kinds or "QAT" in kinds
