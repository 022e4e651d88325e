"""A search beside those of the config, and the arms that it ends in."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdq import config as kdq_config
from kdq.config import Arm, ConfigError, Experiment, Search
from kdq.experiment import costing, plan
from kdq.experiment.context import Context
from kdq.experiment.progress import Progress
from kdq.experiment.store import Store, read_config
from kdq.record import ArmRecord
from kdq.search.cost import CostTable


def arms_of_search(experiment: Experiment, name: str) -> list[str]:
    """Returns the arms that a search ends in, calibrated and trained, each after the same arm of
    uniform bits that it is compared with."""
    baseline = plan.baseline_of(experiment, name)
    pairs = zip(*(_names(search) for search in (baseline, name) if search), strict=True)
    return [arm for stage in pairs for arm in stage]


def _names(search: str) -> tuple[str, str]:
    return f"{search}_ptq", f"{search}_qad"


def with_search(experiment: Experiment, workdir: str | Path, name: str) -> Experiment:
    """The experiment with `config.search` as one of its searches, called `name`, and with its arms.

    Beside it comes a search for the best uniform bits under the same budgets, with arms of its own
    that the search's are compared with. Searches that were added to the same workdir before stay.

    Raises ConfigError for a name that is taken, or a search that can't be.
    """
    search = experiment.search
    if name in experiment.searches:
        raise ConfigError(f"config.searches has a search {name!r} already: choose another --name")
    if search.finetune not in experiment.arms:
        where = "config.search.finetune: arm"
        raise ConfigError(kdq_config.unknown(where, search.finetune, experiment.arms))
    before, last = {}, read_config(Path(workdir))
    for other, searched in last.searches.items() if last else ():
        is_known = other in experiment.searches or other == name
        if not is_known and searched.finetune in experiment.arms:
            before[other] = searched
    uniform = _uniform(experiment, before, name, search)
    searches = {**before, name: search, **uniform}  # what is wrong is said of the first one
    arms = {}
    for added in (*before, *uniform, name):
        baseline = _baseline(searches, searches[added])
        arms |= _arms(experiment, added, searches[added], baseline)
    if taken := arms.keys() & experiment.arms.keys():
        raise ConfigError(f"config.arms has {sorted(taken)} already: choose another --name")
    export = experiment.export
    if not export.formats:
        trained = _names(name)[1]
        export = dataclasses.replace(export, formats=(search.runtime,), arms=(trained,))
    added = dataclasses.replace(
        experiment,
        searches={**experiment.searches, **searches},
        arms={**experiment.arms, **arms},
        export=export,
    )
    return kdq_config.freeze(kdq_config.to_json(added))


def _uniform(
    experiment: Experiment, before: Mapping[str, Search], name: str, search: Search
) -> dict[str, Search]:
    """Returns the search that `search` is compared with, by its name, unless it is there."""
    if search.method == plan.UNIFORM or _baseline(before, search):
        return {}
    taken = {*experiment.searches, *before, name}
    uniform = plan.UNIFORM if plan.UNIFORM not in taken else f"{name}_{plan.UNIFORM}"
    # All uniform policies there are: each choice, and with the most bits at both ends.
    policies = 2 * len(search.choices) * len(search.students)
    evaluations = max(search.evaluations, policies)
    added = dataclasses.replace(search, method=plan.UNIFORM, options={}, evaluations=evaluations)
    return {uniform: added}


def _baseline(searches: Mapping[str, Search], search: Search) -> str:
    """Returns which of some searches is by uniform bits and else the same, or ""."""
    if search.method == plan.UNIFORM:
        return ""
    free = {
        field: getattr(search, field)
        for field in ("method", "options", "evaluations", "sensitivity", "policies_at_once")
    }
    same = [
        name
        for name, other in searches.items()
        if other.method == plan.UNIFORM and dataclasses.replace(other, **free) == search
    ]
    return next(iter(same), "")


def _arms(experiment: Experiment, name: str, search: Search, baseline: str) -> dict[str, Arm]:
    trained = experiment.arms[search.finetune]
    init = trained.init if trained.init in search.students else search.students[0]
    trained = dataclasses.replace(
        trained, bits=name, init=init, load="", ptq="", reference=search.finetune
    )
    calibrated = dataclasses.replace(
        trained, teacher="", distill="", qat="", epochs=0.0, stop=0.0, reference=init
    )
    arms = dict(zip(_names(name), (calibrated, trained), strict=True))
    if baseline:
        compared = zip(arms, _names(baseline), strict=True)
        arms |= {arm: dataclasses.replace(arms[arm], reference=other) for arm, other in compared}
    return arms


def finished(experiment: Experiment, workdir: str | Path) -> list[ArmRecord]:
    """The records of all arms and seeds of an experiment that a workdir has."""
    store = Store(experiment, Path(workdir))
    records = [store.finished(name, seed) for name in experiment.arms for seed in experiment.seeds]
    return [record for record in records if record is not None]


def cost_table(
    experiment: Experiment,
    key: str,
    metrics: Sequence[str],
    *,
    progress: Progress | None = None,
) -> CostTable:
    """Measures what a network costs at the choices of `config.search`, on this device.

    `key` is of its models, `metrics` are beside those that are counted: "size", "latency". Raises
    ConfigError for others.
    """
    if key not in experiment.models:
        raise ConfigError(kdq_config.unknown("model", key, experiment.models))
    for metric in metrics:
        if metric not in ("size", "latency"):
            raise ConfigError(kdq_config.unknown("metric", metric, ("size", "latency")))
    context = Context(experiment, Path(), progress)
    choices = costing.choices_of(experiment.search, context.layers(key), "config.search")
    return costing.build(context, key, experiment.search, choices, metrics)
