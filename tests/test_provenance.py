"""What a record says it came from."""

import os
import platform
import subprocess
from importlib import metadata

import jax
import pytest

from kdq import provenance


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository that `provenance` takes for its own; returns a function that runs git."""
    source = tmp_path / "provenance.py"
    source.write_text("first\n")
    monkeypatch.setattr(provenance, "__file__", str(source))

    def git(*args):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", *identity, *args]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init", "-q")
    return git


def commit() -> str:
    return provenance.commit.__wrapped__()  # past the cache


def test_commit_of_the_source_tree(tmp_path, repository):
    git = repository
    assert commit() == "unknown"  # not tracked
    git("add", "provenance.py")
    assert commit() == "unknown"  # nothing committed yet
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert len(head) == 40
    assert commit() == head
    (tmp_path / "notes.txt").write_text("not tracked")
    assert commit() == head
    (tmp_path / "provenance.py").write_text("second\n")
    assert commit() == f"{head}-dirty"


def test_commit_without_a_repository_or_git(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() == "unknown"
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"


def test_versions_are_those_installed():
    versions = provenance.versions()
    assert versions["python"] == platform.python_version()
    assert versions["jax"] == jax.__version__
    for package in ("kdq", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        assert versions[package] == metadata.version(package)


def test_device_names_the_processor_and_the_cores_it_may_use():
    if jax.default_backend() != "cpu":
        assert jax.devices()[0].device_kind in provenance.device()
        return
    name, _, cores = provenance.device().rpartition(", ")
    assert name
    assert cores == f"{len(os.sched_getaffinity(0))} cores"


def test_device_of_accelerators(monkeypatch):
    class Device:
        platform = "gpu"
        device_kind = "NVIDIA H100"

    monkeypatch.setattr(jax, "devices", lambda: [Device(), Device()])
    assert provenance.device.__wrapped__() == "2 × NVIDIA H100"
