"""What several test folders share: a prepared data set, and an experiment that runs in seconds."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

# Most of the time of the tests goes into compiling, and little of it into what is compiled. Child
# processes take this over, so that what is compared between processes is compiled alike. XLA's
# older emitters take half the time; releases that lack a flag end at its name.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10.")
)

import hypothesis
import jax
import pytest
from playwright.sync_api import sync_playwright

from kdq import config, data
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
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS folder with `digits` in it."""
    directory = tmp_path_factory.mktemp("tfds")
    data.open_split("digits", "train", data_dir=directory)
    return directory


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


# All processes share what they compile: the first makes the folder for it, and removes it.
CACHE = {"JAX_COMPILATION_CACHE_DIR": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
is_worker = "PYTEST_XDIST_WORKER" in os.environ


def pytest_configure() -> None:
    # Whoever runs the tests in the background has Ctrl-C ignored, and children would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if is_worker:
        return
    CACHE["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kdq-tests-")
    os.environ.update(CACHE)
    jax.config.update("jax_compilation_cache_dir", CACHE["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_unconfigure() -> None:
    if not is_worker:
        shutil.rmtree(CACHE["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
