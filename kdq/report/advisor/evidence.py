"""Records of experiments, read for the advisor: studies of arms that may be compared."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdq import files
from kdq.evaluate.statistics import summary
from kdq.fields import ConfigError
from kdq.record import ArmRecord, has_arms
from kdq.report import Record
from kdq.report.advisor import lineage
from kdq.report.advisor.lineage import Lineage
from kdq.report.aggregate import mean_of_all, number

NEEDED = ("arm", "seed", "status", "kind", "bits", "data")
MEASURED = ("params", "accuracy", "validation_accuracy", "size_bytes", "train_seconds")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One file of records or one workdir: an experiment, within which names of arms are unique."""

    name: str  # short, unique among the sources
    path: str
    records: tuple[Record, ...]
    config: Mapping[str, Any] | None  # the config.json of a workdir

    @property
    def config_file(self) -> str:
        """The file in configs/ of the same name, if there is one here; else ""."""
        beside = Path("configs", f"{Path(self.path).stem}.py")
        return str(beside) if beside.is_file() else ""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class File:
    """An exported file, means over seeds."""

    size_bytes: float
    milliseconds: Mapping[int, float]  # by batch size


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One arm, with what was measured of each seed."""

    source: Source
    arm: str
    kind: str
    method: str  # a key of kdq.report.advisor.rules.METHODS
    bits: str
    widths: frozenset[int] | None  # bits of integers; empty for float, None where not known
    params: int
    seeds: tuple[int, ...]
    validation: Mapping[int, float]  # percent, by seed
    validation_nll: float
    test: Mapping[int, float]  # percent, by seed
    size_bytes: float  # of kdq's packed file
    energy_nj: float  # modelled; nan where not recorded
    files: Mapping[str, File]  # by export format
    seconds: float  # of training, with what the arm starts from as far as `lineage` has it
    # Of compiling for that, apart from `seconds`; nan where a record does not tell, which has it
    # there.
    compile_seconds: float
    steps: float  # the arm's own
    lineage: Lineage
    digest: str
    commit: str
    device: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """Arms that may be compared: the same data and, for latencies, one device."""

    data: Mapping[str, str]  # split -> digest
    timed_on: str  # "" where nothing was timed
    sources: tuple[Source, ...]
    candidates: tuple[Candidate, ...]
    failures: tuple[tuple[Source, Record], ...]

    def find(self, source: Source, arm: str | None) -> Candidate | None:
        """An arm of an experiment; None where it has no finished seed."""
        found = (c for c in self.candidates if c.source is source and c.arm == arm)
        return next(found, None)

    def teacher(self, source: Source) -> Candidate | None:
        """The teacher of an experiment."""
        found = (c for c in self.candidates if c.source is source and c.kind == "teacher")
        return next(found, None)


def read(workdirs: Sequence[str], records: Sequence[str]) -> list[Source]:
    """Reads workdirs (ARM/SEED/result.json) and JSON lists of records.

    Raises:
      ConfigError: nothing is given, or a place holds no records.
    """
    if not workdirs and not records:
        raise ConfigError(
            "there is nothing to judge by: want --workdirs=RUNS (folders of launch/compress.py), "
            "--records=FILE.json (lists of records, as docs/results/*.json), or both"
        )
    if len({*workdirs, *records}) < len(workdirs) + len(records):
        raise ConfigError(f"given twice in --workdirs={workdirs}, --records={records}")
    names = _names([*workdirs, *records])
    return [_workdir(path, names[path]) for path in workdirs] + [
        _file(path, names[path]) for path in records
    ]


def _names(paths: Sequence[str]) -> dict[str, str]:
    """Short names where these are unique, else the whole path."""
    short = {path: Path(path).stem for path in paths}
    return {p: n if list(short.values()).count(n) == 1 else p for p, n in short.items()}


def _workdir(path: str, name: str) -> Source:
    paths = sorted(Path(path).glob("*/*/result.json"))
    if not paths:
        raise ConfigError(f"--workdirs: {path} holds no ARM/SEED/result.json of a finished arm")
    config = Path(path, "config.json")
    known = _config(config) if config.is_file() else None
    records = [_json(file) for file in paths]
    if known:  # in the order of the config, not of the alphabet
        order = {arm: place for place, arm in enumerate(known["arms"])}
        records.sort(key=lambda record: _place(record, order))
    return _source(path, name, records, known)


def _place(record: Any, order: Mapping[str, int]) -> int:
    arm = record.get("arm") if isinstance(record, Mapping) else None
    return order.get(arm, len(order)) if isinstance(arm, str) else len(order)


def _config(path: Path) -> Mapping[str, Any]:
    """The config of a workdir, of which the arms count here."""
    known = _json(path)
    if not has_arms(known):
        raise ConfigError(f"{path} is no config of an experiment: it has no arms")
    return known


def _file(path: str, name: str) -> Source:
    found = _json(Path(path))
    if not isinstance(found, list) or not found:
        raise ConfigError(f"--records: {path} is no list of records (as WORKDIR/results.json is)")
    return _source(path, name, found, None)


def _json(path: Path) -> Any:
    try:
        return files.read_json(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error


def _source(path: str, name: str, records: list[Any], config: Mapping[str, Any] | None) -> Source:
    seen = set()
    for i, record in enumerate(records):
        fields = record if isinstance(record, Mapping) else {}
        wanted = NEEDED + (MEASURED if fields.get("status") == "ok" else ())
        missing = [key for key in wanted if fields.get(key) is None]
        if missing:
            raise ConfigError(
                f"{path}: record {i} ({fields.get('arm', 'no arm')}) has no {', '.join(missing)}; "
                "want records that launch/compress.py wrote"
            )
        try:
            ArmRecord.from_json(record)
        except ConfigError as error:
            raise ConfigError(f"{path}: record {i} ({record['arm']}): {error}") from error
        if (key := (record["arm"], record["seed"])) in seen:
            raise ConfigError(f"{path}: two records of arm {key[0]!r} seed {key[1]}")
        seen.add(key)
        if config and record["arm"] not in config["arms"]:
            raise ConfigError(f"{path}: config.json knows no arm {record['arm']!r}")
    return Source(name=name, path=path, records=tuple(records), config=config)


def studies(sources: Iterable[Source]) -> list[Study]:
    """Groups what may be compared: by the digests of the data, and by the device of latencies."""
    groups: dict[tuple[tuple[str, str], ...], list[tuple[Source, list[Record]]]] = {}
    for source in sources:
        for record in source.records:
            group = groups.setdefault(tuple(sorted(record["data"].items())), [])
            if not group or group[-1][0] is not source:
                group.append((source, []))
            group[-1][1].append(record)
    found = []
    for group in groups.values():
        merged: dict[str, tuple[Source, list[Record]]] = {}
        for source, records in group:
            merged.setdefault(source.name, (source, []))[1].extend(records)
        every = [record for _, records in merged.values() for record in records]
        devices = dict.fromkeys(d for record in every for d in _timed_on(record))
        for device in devices or ("",):
            found.append(_study(every[0]["data"], device, list(merged.values())))
    return found


def _study(data: Mapping[str, str], device: str, group: list[tuple[Source, list[Record]]]) -> Study:
    candidates, failures = [], []
    for source, records in group:
        finished: dict[str, list[Record]] = {}
        for record in records:
            if record["status"] == "ok":
                finished.setdefault(record["arm"], []).append(record)
            else:
                failures.append((source, record))
        arms = {arm: runs[0] for arm, runs in finished.items()}
        for arm in arms:
            candidates.append(_candidate(source, arm, arms, finished, device))
    return Study(
        data=data,
        timed_on=device,
        sources=tuple(source for source, _ in group),
        candidates=tuple(candidates),
        failures=tuple(failures),
    )


def _candidate(
    source: Source,
    arm: str,
    arms: Mapping[str, Record],
    finished: Mapping[str, list[Record]],
    device: str,
) -> Candidate:
    runs, first = finished[arm], arms[arm]
    if len(values := {str(r["kind"]) for r in runs}) > 1:
        raise ConfigError(f"{source.path}: seeds of {arm!r} disagree on kind: {values}")
    if source.config:
        own = lineage.of_config(source.config, arm)
    else:
        own = lineage.of_references(arms, arm)
    spent = [_mean(finished[name], "train_seconds") for name in own.trained if name in finished]
    compiled = [
        mean_of_all(finished[name], "compile_seconds") for name in own.trained if name in finished
    ]
    if own.known and len(spent) < len(own.trained):
        own = dataclasses.replace(own, known=False)  # an arm that it starts from is not there
    percent = lambda key: {r["seed"]: 100 * number(r, key) for r in runs}
    return Candidate(
        source=source,
        arm=arm,
        kind=first["kind"],
        method=_method(runs, own),
        bits=", ".join(dict.fromkeys(str(r["bits"]) for r in runs)),
        widths=_widths(runs),
        params=round(_mean(runs, "params")),  # a search may choose other widths for other seeds
        seeds=tuple(sorted(r["seed"] for r in runs)),
        validation=percent("validation_accuracy"),
        validation_nll=_mean(runs, "validation_nll"),
        test=percent("accuracy"),
        size_bytes=_mean(runs, "size_bytes"),
        energy_nj=_mean(runs, "energy_modelled_nj"),
        files=_files(runs, device),
        seconds=sum(spent),
        compile_seconds=sum(compiled),
        steps=_mean(runs, "steps"),
        lineage=own,
        digest=_distinct(runs, "config_digest"),
        commit=_distinct(runs, "commit"),
        device=_distinct(runs, "device"),
    )


def _method(runs: Sequence[Record], own: Lineage) -> str:
    if any(len(set((r.get("policy") or {}).values())) > 1 for r in runs):
        return "mixed precision"  # a search may find the same bits for all layers at one seed
    kind = runs[0]["kind"]
    if kind in ("teacher", "labels"):
        return "labels only"
    if kind == "PTQ" and own.distilled:
        return "KD then PTQ"
    return kind


def _widths(runs: Sequence[Record]) -> frozenset[int] | None:
    """The bits of all integers; None for a name that does not say."""
    found: set[int] = set()
    for bits in [b for r in runs for b in (r.get("policy") or {"": r["bits"]}).values()]:
        if bits in ("fp32", ""):
            continue
        match = re.fullmatch(r"(?:W(\d+))?(?:A(\d+))?", str(bits))
        if match is None:
            return None
        found |= {int(width) for width in match.groups() if width}
    return frozenset(found)


def _timed_on(record: Record) -> list[str]:
    return [
        entry["latency"]["conditions"]["device"]
        for entry in (record.get("exports") or {}).values()
        if "latency" in entry
    ]


def _files(runs: Sequence[Record], device: str) -> dict[str, File]:
    """Exported files, with the latencies that were taken on the device."""
    entries: dict[str, list[Mapping[str, Any]]] = {}
    for record in runs:
        for name, entry in (record.get("exports") or {}).items():
            entries.setdefault(name, []).append(entry)
    return {
        name: File(
            size_bytes=summary(e["size_bytes"] for e in own)[0], milliseconds=_times(own, device)
        )
        for name, own in entries.items()
    }


def _times(entries: Sequence[Mapping[str, Any]], device: str) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for entry in entries:
        latency = entry.get("latency") or {}
        if latency.get("conditions", {}).get("device") == device:
            for batch, times in latency.items():
                if batch != "conditions":
                    found.setdefault(int(batch), []).append(times["milliseconds"])
    return {batch: summary(times)[0] for batch, times in found.items()}


def _mean(runs: Sequence[Record], key: str) -> float:
    values = [v for v in (number(r, key) for r in runs) if not math.isnan(v)]
    return summary(values)[0]


def _distinct(runs: Sequence[Record], key: str) -> str:
    return " and ".join(dict.fromkeys(str(r[key]) for r in runs if r.get(key))) or "not recorded"
