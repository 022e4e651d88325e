"""What a search came to, and the arm that it makes of an arm."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kdq.config import Experiment
from kdq.search import bank
from kdq.search.spaces import DISTILLED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to."""

    name: str
    chosen: Mapping[str, str]  # {"student": arm, layer path: "W4A8", "distill/TERM": "on"}
    observer: str
    told: Mapping[str, Any]  # the search, for records

    @property
    def layers(self) -> dict[str, str]:
        """{layer path: "W4A8"}."""
        return {
            k: v for k, v in self.chosen.items() if k != "student" and not k.startswith(DISTILLED)
        }

    @property
    def record(self) -> dict[str, Any]:
        """Fields of the record of an arm."""
        return {"policy": self.layers, "search": self.told}

    def applied(self, experiment: Experiment, name: str) -> Experiment:
        """The experiment in which the arm `name` is what was found."""
        student = experiment.arms[self.chosen["student"]]
        arm = dataclasses.replace(
            experiment.arms[name], init=self.chosen["student"], model=student.model
        )
        left_out = {k.removeprefix(DISTILLED) for k, v in self.chosen.items() if v == "off"}
        distill = dict(experiment.distill)
        if arm.distill and left_out:
            whole = distill[arm.distill]
            terms = {k: v for k, v in whole.terms.items() if k not in left_out}
            distill[arm.distill] = dataclasses.replace(whole, terms=terms)
        rules = {**experiment.rules, self.name: bank.to_rules(self.layers, self.observer)}
        return dataclasses.replace(
            experiment, arms={**experiment.arms, name: arm}, rules=rules, distill=distill
        )
