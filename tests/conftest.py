"""What several test folders share: a prepared data set, and an experiment that runs in seconds."""

import contextlib
import fcntl
import gc
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

# Most of the time of the tests goes into compiling, and little of it into what is compiled. Child
# processes inherit these settings, so that they find what the tests compiled, and what is compared
# between processes is compiled alike. XLA's older emitters take half the time; releases that lack a
# flag end at its name.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10.")
)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Programs say of no operation by which lines of Python it was made: lowering takes 3 % less.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
# Compiled programs outlive a run of the tests. XLA's own caches would make the folder's path a part
# of what programs are found by.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

import digits_run
import hypothesis
import jax
import pytest
from playwright.sync_api import sync_playwright

from kdq import config, data, experiment, provenance
from kdq.arms import kl

# The same examples each time: a commit passes or it does not.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's browser, without a window."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        # Containers, where CI is root, have no namespaces for its sandbox.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a report; at the end nothing may have been said, asked for, or shown by scripts."""
    said: list[str] = []
    pages = []

    def open_page(path: Path, **options: Any) -> Any:
        page = chromium.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        address = path.resolve().as_uri()
        local = ("data:", "blob:")
        page.on(
            "request",
            lambda r: r.url.startswith((address, *local)) or said.append(f"asked for {r.url}"),
        )
        page.goto(address)
        page.wait_for_selector("html.drawn", timeout=60_000)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert said == []


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a folder by a function of its path once a session; other workers wait and share it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if is_worker else base) / "shared"
    shared.mkdir(exist_ok=True)

    def make(name: str, fill: Callable[[Path], Any]) -> Path:
        folder, finished = shared / name, shared / f"{name}.finished"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker whose function failed
                fill(folder)
                finished.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def data_dir(make_once: Callable[..., Path]) -> Path:
    """A TFDS folder with `digits` in it."""
    return make_once("tfds", lambda path: data.open_split("digits", "train", data_dir=path))


@pytest.fixture(scope="session")
def finished(
    tiny_config: Callable[..., dict[str, Any]],
    make_once: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[config.Experiment, Path, list[Any]]:
    """The tiny experiment, a folder in which it is finished, and its records."""
    frozen = config.freeze(tiny_config())
    shared = make_once("finished", lambda path: experiment.run(frozen, path))
    workdir = tmp_path_factory.mktemp("finished") / "run"  # a worker's own: runs lock their folder
    shutil.copytree(shared, workdir)
    return frozen, workdir, experiment.run(frozen, workdir)  # nothing is left to do


@pytest.fixture(scope="session")
def digits_folder(make_once: Callable[..., Path], data_dir: Path) -> Path:
    """The folder of tests/digits_run.py, whose process runs once."""
    return make_once("digits_run", lambda path: digits_run.make(path, data_dir))


@pytest.fixture
def copied(finished: tuple[config.Experiment, Path, list[Any]], tmp_path: Path) -> Path:
    """A copy of the folder of `finished`, to change."""
    return shutil.copytree(finished[1], tmp_path / "run")


@pytest.fixture(scope="session")
def tiny_config(data_dir: Path) -> Callable[..., dict[str, Any]]:
    """Makes the config of an experiment with every kind of arm, as plain dicts."""

    def make() -> dict[str, Any]:
        taught = {"teacher": "teacher", "distill": "kd"}
        return {
            "seeds": (0,),
            "data": {
                "name": "digits",
                "data_dir": str(data_dir),
                "batch_size": 64,
                "eval_batch_size": 128,  # the last batch is padded
                "mean": 4.9,
                "std": 6.0,
            },
            "models": {
                "teacher": {"name": "cnn", "num_classes": 10, "widths": (8, 8), "batch_norm": True},
                "student": {"name": "cnn", "num_classes": 10, "widths": (4, 6)},
            },
            "quantize": {"keep": ("conv_0",), "calibration_examples": 128},
            "distill": {"kd": kl(alpha=0.7, temperature=2.0)},
            "ptq": {"corrected": ({"method": "bias_correction"},)},
            "qat": {
                "damped": {
                    "method": "lsq",
                    "least_bits": {"kind": "phases", "values": (8.0, 0.0), "starts": (0.0, 0.4)},
                    "dampen": {"kind": "cosine", "start": 0.0, "end": 1e-3},
                    "freeze": 0.02,
                    "freeze_norm": 0.5,
                }
            },
            "evaluations": 3,
            "checkpoint_seconds": 0.0,
            "arms": {
                "teacher": {"model": "teacher", "epochs": 1.0, "learning_rate": 1e-2},
                "student": {"model": "student", "epochs": 1.0, "learning_rate": 1e-2},
                "kd": {
                    "model": "student",
                    "epochs": 1.0,
                    "learning_rate": 1e-2,
                    "reference": "student",
                    **taught,
                },
                "ptq": {"model": "student", "init": "student", "bits": "W4A4", "ptq": "corrected"},
                "qat": {
                    "model": "student",
                    "init": "student",
                    "bits": "W4A4",
                    "epochs": 0.5,
                    "qat": "damped",
                },
                "qad": {"model": "student", "init": "kd", "bits": "W2", "epochs": 0.5, **taught},
            },
        }

    return make


@pytest.fixture
def tiny_experiment(tiny_config: Callable[..., dict[str, Any]]) -> config.Experiment:
    return config.freeze(tiny_config())


CACHE_DAYS = 14  # programs that no test asked for in this time are deleted
# Memory maps of a worker, of which Linux gives a process 65,530: compiled programs hold most.
MOST_MAPS = 30_000
is_worker = "PYTEST_XDIST_WORKER" in os.environ
# Files of whole runs and of processes, by their seconds of the processor. A worker takes files one
# after another: these are begun first, so that at the end the workers end together. Docs come some
# files after the launch whose run they read, for which their worker would wait.
LONGEST = (
    *("tests/deploy/test_zoo.py", "tests/test_launch_sweep.py", "tests/golden/test_record.py"),
    *("tests/test_launch_compress.py", "tests/notebooks/test_notebooks.py"),
    *("tests/experiment/test_meshes.py", "tests/docs/test_snippets.py"),
    *("tests/experiment/test_task_runs.py", "tests/experiment/test_runner.py"),
    *("tests/experiment/test_searching.py", "tests/experiment/test_search_finetuning.py"),
    *("tests/experiment/test_teaching.py", "tests/test_launch_search.py"),
    *("tests/deploy/test_litert.py", "tests/deploy/test_lowering.py", "tests/deploy/test_onnx.py"),
    *("tests/experiment/test_sharing.py", "tests/experiment/test_uniform.py"),
    *("tests/train/test_loop.py", "tests/search/test_searchers.py", "tests/test_own.py"),
    *("tests/experiment/test_store.py", "tests/deploy/test_export.py", "tests/search/test_run.py"),
    *("tests/report/test_browser.py", "tests/search/test_agents.py"),
)


@pytest.fixture(scope="module", autouse=True)
def _release_programs() -> Iterator[None]:
    """Forgets compiled programs before a worker has no memory maps left, and dies."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONGEST)))


def pytest_collection_finish() -> None:
    # What is imported and collected stays: the collector need not visit it again and again.
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_configure() -> None:
    # Whoever runs the tests in the background has Ctrl-C ignored, and children would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Bytecode outlives the run, even if the environment says otherwise: without it each worker
    # rewrites the assertions of every test file, and each launched program compiles kdq.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    folder = compilation_cache()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if not is_worker:
        folder.mkdir(parents=True, exist_ok=True)
        delete_unused(folder)


def compilation_cache() -> Path:
    """Returns the folder of compiled programs: in KDQ_TEST_CACHE, else in the user's cache.

    Programs are found by what they are and by the version of XLA, not by the processor.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("KDQ_TEST_CACHE") or Path(home, "kdq", "tests"))
    return root / f"jaxlib-{metadata.version('jaxlib')}-{provenance.processor_digest()}"


def delete_unused(folder: Path) -> None:
    """Deletes the files of `folder` that were not read for CACHE_DAYS days."""
    oldest = time.time() - CACHE_DAYS * 24 * 3600
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run of the tests deletes too
            if max(file.stat().st_atime, file.stat().st_mtime) < oldest:
                file.unlink()
