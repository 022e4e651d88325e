"""The one reader of workdirs (ARM/SEED/result.json) and of files of records."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdq import files
from kdq.fields import ConfigError
from kdq.record import ArmRecord, has_arms
from kdq.report import metric as metrics
from kdq.report.aggregate import number

if TYPE_CHECKING:
    from kdq.evaluate.run import Scores

# Fields that the advisor needs of any record, and of one that did not fail.
NEEDED = ("arm", "seed", "status", "kind", "bits", "data")
MEASURED = ("params", "size_bytes", "train_seconds")
SCORES = "scores.npz"  # beside a record: `kdq.evaluate.run.Scores` of the packed file on test
AGREES = 1e-4  # of the metric from the scores, which are float32, with the record's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One arm and seed: its record, and the folder with its curves and details."""

    record: ArmRecord
    folder: Path
    scores: "Scores | None" = None  # of single test examples, as far as the metric needs them
    lost: str = ""  # why there are none, though there is a file of them


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Workdir:
    """A workdir or a file of records: an experiment, within which names of arms are unique."""

    name: str  # short, unique among those that are read together
    path: str
    config: Mapping[str, Any] | None  # its config.json
    runs: tuple[Run, ...]
    problems: tuple[str, ...] = ()  # what was left out, and why

    @property
    def records(self) -> tuple[ArmRecord, ...]:
        """The records of all runs."""
        return tuple(run.record for run in self.runs)

    @property
    def scores(self) -> dict[tuple[str, int], "Scores"]:
        """Scores of single test examples by arm and seed, of the runs that kept them."""
        runs = (run for run in self.runs if run.scores is not None)
        return {(run.record.arm, run.record.seed): run.scores for run in runs}

    @property
    def config_file(self) -> str:
        """The file in configs/ of the same name, if there is one here; else ""."""
        file = Path("configs", f"{Path(self.path).stem}.py")
        return str(file) if file.is_file() else ""


def read_workdirs(paths: Sequence[str]) -> list[Workdir]:
    """Reads `ARM/SEED/result.json` of every workdir; what can't be read is left out and named.

    Raises:
      ConfigError: no workdir, one given twice, or one without a record that can be read.
    """
    if not paths:
        raise ConfigError(
            "expected --workdirs=RUNS: folders of launch/compress.py or launch/train.py"
        )
    resolved = [Path(path).resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ConfigError(f"--workdirs: a folder is given twice: {', '.join(map(str, paths))}")
    names = _short_names(paths, [path.name for path in resolved])
    workdirs = [_read(path, names[path], _find_records(path), strict=False) for path in paths]
    for workdir in workdirs:
        if not workdir.runs:
            raise ConfigError(
                f"--workdirs: no record of {workdir.path} can be read: {workdir.problems[-1]}"
            )
    return workdirs


def read_evidence(workdirs: Sequence[str], records: Sequence[str]) -> list[Workdir]:
    """Reads workdirs and JSON lists of records, all of which have what the advisor needs.

    Raises:
      ConfigError: nothing is given, a place holds no records, or one that can't be judged.
    """
    if not workdirs and not records:
        raise ConfigError(
            "there is nothing to judge by: expected --workdirs=RUNS (folders of "
            "launch/compress.py), --records=FILE.json (lists of records, as docs/results/*.json), "
            "or both"
        )
    paths = [*workdirs, *records]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"given twice in --workdirs={workdirs}, --records={records}")
    names = _short_names(paths, [Path(path).stem for path in paths])
    read = [_read(path, names[path], _find_records(path), strict=True) for path in workdirs]
    for path in records:
        documents = read_json(Path(path))
        if not isinstance(documents, list) or not documents:
            expected = "list of records (as WORKDIR/results.json is)"
            raise ConfigError(f"--records: {path} is no {expected}")
        places = [(Path(path), document) for document in documents]
        read.append(_read(path, names[path], places, strict=True))
    return read


def workdir_of_records(documents: Sequence[Any], workdir: Path) -> Workdir:
    """Returns a workdir of which the JSON forms of the records are known already."""
    places = [(workdir / str(d.get("arm")) / str(d.get("seed")), d) for d in documents]
    return _read(str(workdir), workdir.resolve().name, places, strict=False)


def lacking(record: ArmRecord) -> list[str]:
    """Returns the fields that the advisor needs and a record lacks."""
    missing = [name for name in NEEDED if getattr(record, name) in ("", {})]
    if record.status == "ok":
        metric = metrics.metric_of_records([record]).name
        missing += [name for name in (*MEASURED, metric) if math.isnan(number(record, name))]
        if math.isnan(number(record, metric, "validation")):
            missing.append(f"validation_{metric}")
    return missing


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file. Raises ConfigError, with its name, if there is none."""
    try:
        return files.read_json(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error


def _short_names(paths: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Returns names where these are unique, else the whole path."""
    pairs = zip(paths, names, strict=True)
    return {path: name if names.count(name) == 1 else path for path, name in pairs}


def _find_records(path: str) -> list[tuple[Path, Path]]:
    files = sorted(Path(path).glob("*/*/result.json"))
    if not files:
        raise ConfigError(f"--workdirs: {path} holds no ARM/SEED/result.json of a finished arm")
    return [(file.parent, file) for file in files]


def _read(path: str, name: str, documents: Iterable[tuple[Path, Any]], *, strict: bool) -> Workdir:
    """Reads records: (folder, JSON object or its file). If `strict`, nothing may be wrong."""
    problems: list[str] = []

    def leave_out(reason: object) -> None:
        if strict:
            raise ConfigError(str(reason))
        problems.append(str(reason))

    config, file = None, Path(path, "config.json")
    if file.is_file():
        try:
            config = read_json(file)
            if not has_arms(config):
                config = None
                leave_out(f"{file} is no config of an experiment: it has no arms")
        except ConfigError as error:
            leave_out(error)
    elif not strict:
        problems.append(f"{file} is not there: what arms start from is inferred")
    runs: list[Run] = []
    for i, (folder, document) in enumerate(documents):
        try:
            document = read_json(document) if isinstance(document, Path) else document
        except ConfigError as error:
            leave_out(error)
            continue
        reasons: list[str] = []
        try:
            record = ArmRecord.from_json(document, None if strict else reasons)
            metrics.task_of_records([record])  # one that this version does not know is refused
            if strict:
                _check_evidence(record, runs, config)
        except ConfigError as error:
            arm = document.get("arm") if isinstance(document, Mapping) else "no arm"
            leave_out(f"{f'{path}: record {i} ({arm})' if strict else folder}: {error}")
            continue
        problems += [f"{folder}: left out {reason}" for reason in reasons]
        run = _with_scores(Run(record=record, folder=folder))
        if run.lost and not strict:
            problems.append(f"{run.lost}: left out, intervals are over seeds alone")
        runs.append(run)
    if config:  # in the order of the config, not of the alphabet
        order = {arm: place for place, arm in enumerate(config["arms"])}
        runs.sort(key=lambda run: order.get(run.record.arm, len(order)))
    return Workdir(
        name=name, path=str(Path(path)), config=config, runs=tuple(runs), problems=tuple(problems)
    )


def _with_scores(run: Run) -> Run:
    """Returns a run with the scores of its test examples, or with what is wrong with their file."""
    path = run.folder / SCORES
    if run.record.status != "ok" or not path.is_file():
        return run
    from kdq.evaluate.run import Scores  # noqa: PLC0415 (JAX, which reports without do without)

    metric = metrics.metric_of_records([run.record])
    try:
        scores = Scores.load(path)
        arrays = {name: scores.arrays[name] for name in metric.scores}
    except (files.DamagedError, OSError) as error:
        return dataclasses.replace(run, lost=str(error))
    except KeyError as error:
        return dataclasses.replace(run, lost=f"{path} has no {error.args[0]!r} for {metric.name}")
    value, recorded = metric.compute(arrays), number(run.record, metric.name)
    if not math.isclose(value, recorded, rel_tol=AGREES, abs_tol=AGREES):
        why = f"{path} has {metric.name} {value:.6g}, its record {recorded:.6g}"
        return dataclasses.replace(run, lost=why)
    return dataclasses.replace(run, scores=dataclasses.replace(scores, arrays=arrays))


def _check_evidence(
    record: ArmRecord, before: Sequence[Run], config: Mapping[str, Any] | None
) -> None:
    """Raises ConfigError for a record that the advisor can't judge, or that is there twice."""
    if missing := lacking(record):
        names = ", ".join(missing)
        raise ConfigError(f"{names} missing; expected records that launch/compress.py wrote")
    if any((r.record.arm, r.record.seed) == (record.arm, record.seed) for r in before):
        raise ConfigError(f"two records of arm {record.arm!r} seed {record.seed}")
    if config and record.arm not in config["arms"]:
        raise ConfigError(f"config.json knows no arm {record.arm!r}")
