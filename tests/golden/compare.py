"""Runs every kind of arm at a commit and in this tree, on this machine, and wants equal bits.

    python tests/golden/compare.py HEAD~3

Prints each file whose bits differ, and for records the fields; status 1 if there is any.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from kdq.record import ArmRecord

ROOT = Path(__file__).parents[2]
CACHES = ("memory", "none", "dense", "top_k", "sampled")
# Records say when, how long and from which commit, too, and are sealed over that.
VARYING = ("seconds", "commit", "latency", "versions", "seal")


def main() -> None:
    """Parses the command line, runs both trees, and says where they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="what this tree is compared with")
    parser.add_argument("--caches", nargs="*", default=CACHES, help="kinds of the teachers' cache")
    parser.add_argument("--out", type=Path, help="folder that keeps the runs; else a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        before = out / "before"
        git("worktree", "add", "--force", "--detach", str(before), arguments.commit)
        try:
            differences = []
            for cache in arguments.caches:
                folders = [out / f"{name}-{cache}" for name in ("before", "now")]
                for tree, folder in zip((before, ROOT), folders, strict=True):
                    run(tree, cache, folder)
                differences += [f"{cache}: {line}" for line in compare(*folders)]
        finally:
            git("worktree", "remove", "--force", str(before))
    print("\n".join(differences) or "equal, to the bit")
    sys.exit(bool(differences))


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def run(tree: Path, cache: str, folder: Path) -> None:
    """Runs the experiment of this tree by the package of another."""
    config = ROOT / "tests" / "golden" / "every_arm.py"
    command = [sys.executable, "launch/compress.py", f"--config={config}:cache={cache}"]
    command += [f"--workdir={folder}", "--config.workers=1"]
    command.append(f"--compilation_cache_dir={folder.parent / 'compiled'}")
    environment = os.environ | {"PYTHONPATH": str(tree)}
    print("running", tree, cache, file=sys.stderr, flush=True)
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)


def compare(before: Path, now: Path) -> Iterator[str]:
    """Yields a line for each difference between two finished workdirs."""
    files = [contents(folder) for folder in (before, now)]
    for name in sorted(files[0].keys() | files[1].keys()):
        if name not in files[0] or name not in files[1]:
            yield f"{name}: only {'before' if name in files[0] else 'now'}"
        elif files[0][name] != files[1][name]:
            yield f"{name}: {'; '.join(changes(files[0][name], files[1][name]))}"


def contents(folder: Path) -> dict[str, Any]:
    """Returns what must not change of a workdir, by the name of its file."""
    files: dict[str, Any] = {}
    for path in sorted(folder.glob("*/*/model.safetensors")):
        files[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.glob("*/*/export/*.*")):
        if path.suffix != ".json":
            files[str(path.relative_to(folder))] = path.stat().st_size
    for path in sorted(folder.glob("*/*/result.json")):
        record = ArmRecord.from_json(json.loads(path.read_text()))  # the other tree may be older
        files[str(path.relative_to(folder))] = lasting(record.to_json())
    for path in sorted(folder.glob("*/*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        files[str(path.relative_to(folder))] = lasting(rows)
    return files


def lasting(value: Any, varying: Collection[str] = VARYING) -> Any:
    """Returns a record without what differs between two runs of the same program."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(word in k for word in varying)}
        return {k: lasting(v, varying) for k, v in kept.items()}
    return [lasting(v, varying) for v in value] if isinstance(value, list) else value


def changes(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """Yields where two JSON values differ, with both."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from changes(before.get(key), now.get(key), f"{where}.{key}".strip("."))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (first, second) in enumerate(zip(before, now, strict=True)):
            yield from changes(first, second, f"{where}[{i}]")
    elif before != now:
        yield f"{where} {before!r} -> {now!r}".strip()


if __name__ == "__main__":
    main()
