"""What the pages' commands write does not turn up in `git status`."""

import shutil
import subprocess

import pytest
from blocks import ALL, INLINE_COMMANDS, ROOT, commands

FOLDERS = ("--out=", "--data_dir=", "--workdir=", "--config.data.data_dir=")


def written() -> list[str]:
    """The folders that commands of README.md and docs/ write to, in the checkout."""
    shell = [block for block in ALL if block.language == "sh" and not block.reason]
    lines = [words for block in shell for words in commands(block.code)]
    lines += [words for _, words in INLINE_COMMANDS]
    values = {
        word.removeprefix(flag)
        for words in lines
        for word in words
        for flag in FOLDERS
        if word.startswith(flag)
    }
    return sorted(value for value in values if not value.startswith(("/", "~", "benchmarks/")))


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no checkout of git"
)
def test_what_commands_write_is_ignored():
    folders = written()
    assert {"exported", "report", "data", "runs/digits"} <= set(folders)
    files = [f"{folder}/file" if "." not in folder else folder for folder in folders]
    run = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True)
    assert set(files) - set(run.stdout.split()) == set()
    # Folders of these names inside the package are no output.
    package = ["kdq/report/write.py", "kdq/data/sources/idx.py"]
    run = subprocess.run(["git", "check-ignore", *package], cwd=ROOT, capture_output=True)
    assert run.returncode == 1
