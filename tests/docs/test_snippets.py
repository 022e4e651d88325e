"""Every code block of README.md and docs/ is run, or checked, or says why it is not.

Python blocks of a page run in order in one namespace, in a folder where `runs/digits` is a finished
run and where the names that guides take for granted (`model`, `config`, ...) are there. Commands of
shell blocks, and those within sentences, are parsed by the programs themselves.
"""

import configparser
import contextlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator

import blocks
import flax.linen as nn
import jax
import ml_collections
import numpy as np
import parse_commands
import pytest
from blocks import ALL, INLINE_COMMANDS, ROOT
from digits_run import ARMS
from sklearn.datasets import load_digits

from kdq import config, deploy, experiment, quantize
from kdq.experiment import check
from kdq.experiment.context import Context
from kdq.search import problem, searchers

QUICKSTART = "docs/quickstart.md"
# Whose configs are frozen, but not held against data and layers.
FROZEN_ONLY = {
    "docs/quantization.md": "groups of 32 do not divide the inputs of the digits student"
}
PYTHON = [block for block in ALL if block.language == "python" and not block.reason]
SHELL = [block for block in ALL if block.language == "sh" and not block.reason]
NOT_RUN = [block for block in ALL if block.reason]
EXACT = {
    (
        "python",
        "benchmarks/export_matrix.py",
        "--out=benchmarks/results/export_matrix.json",
        "--docs=docs/deployment.md",
    ),
    ("python3", "-m", "venv", ".venv"),
    (".venv/bin/python", "-m", "pytest"),
    ("apt-get", "install", "dataset-fashion-mnist"),
}


class Guide(nn.Module):
    """The network that guides call `model`."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        for name in ("stem", "body"):
            x = nn.relu(nn.Dense(64, name=name)(x))
        return nn.Dense(10, name="head")(x)


@pytest.fixture(scope="module")
def digits_config(data_dir) -> ml_collections.ConfigDict:
    """configs/digits.py:quick with a few of its arms."""
    made = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]("quick")
    for name in set(made.arms) - set(ARMS):
        del made.arms[name]
    made.data.data_dir = str(data_dir)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits_folder, data_dir):
    """The reader's: a checkout in which the digits have been run."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "docs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(digits_folder / "copy", folder / "runs" / "digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(data_dir))
        experiment.export(
            folder / "runs" / "digits", "qad_w4a4_kd", formats=("onnx",), out=folder / "exported"
        )
    return folder


@pytest.fixture
def page(folder, digits_config, data_dir, monkeypatch) -> Iterator[types.ModuleType]:
    """A module for the blocks of a page, with what guides take for granted."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    module = types.ModuleType("page_of_docs")
    module.__file__ = str(folder)  # TFDS looks for files beside a builder's module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    images = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    variables = Guide().init(jax.random.key(0), images)
    rules = quantize.uniform_rules(4, 8)
    vars(module).update(
        model=Guide(),
        variables=variables,
        images=images,
        batches=[images, images[::-1]],
        qparams=quantize.calibrate(Guide(), variables, rules, [images]),
        config=digits_config.copy_and_resolve_references(),
    )
    with tables_of_names():
        yield module


@contextlib.contextmanager
def tables_of_names():
    """kdq's tables of names, to which guides add, are afterwards what they were."""
    from kdq.distill import methods  # noqa: PLC0415
    from kdq.experiment.quantized import OBSERVERS  # noqa: PLC0415
    from kdq.quantize import qat  # noqa: PLC0415
    from kdq.quantize.ptq import chain  # noqa: PLC0415

    tables = (
        methods.METHODS,
        OBSERVERS,
        qat.METHODS,
        chain.AFTER,
        chain.METHODS,
        searchers.METHODS,
    )
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, names in zip(tables, before, strict=True):
            table.clear()
            table.update(names)


def check_config(made: ml_collections.ConfigDict, folder, deep: bool) -> None:
    """As a run would, with an arm for each recipe, rule and chain that none has."""
    made = made.copy_and_resolve_references()
    taught = {"model": "student", "teacher": "teacher", "epochs": 1.0}
    quantized = {"model": "student", "init": "student", "bits": "W4A4"}
    for arm in made.arms.values():  # where a page shows other recipes than the config has
        if arm.distill and arm.distill not in made.distill:
            arm.distill = next(iter(made.distill))
    for key in made.distill:
        made.arms[f"by_{key}"] = config.arm(**taught, distill=key)
    for field in ("ptq", "qat"):
        for key in made[field]:
            more = {"epochs": 1.0} if field == "qat" else {}
            made.arms[f"{field}_{key}"] = config.arm(**quantized, **{field: key}, **more)
    for key in made.rules:
        made.arms[f"bits_{key}"] = config.arm(**{**quantized, "bits": key})
    frozen = config.freeze(made)
    if deep:
        check.check(Context(frozen, folder / "nothing"), list(frozen.arms))


@pytest.mark.parametrize("name", list(dict.fromkeys(block.page for block in PYTHON)))
def test_python_runs(page, folder, name):
    own = [block for block in PYTHON if block.page == name]
    if name != QUICKSTART:  # README has the same program, which runs once
        programs = {block.code for block in PYTHON if block.page == QUICKSTART}
        own = [block for block in own if block.code not in programs]
    for block in own:
        padded = "\n" * (block.line - 1) + block.code
        exec(compile(padded, str(ROOT / block.page), "exec"), vars(page))
        if re.search(r"^config\b.* = ", block.code, re.MULTILINE):
            here = page.config.data.name == "digits" or page.config.data.name.endswith(".npz")
            check_config(page.config, folder, deep=here and name not in FROZEN_ONLY)
    if hasattr(page, "get_sweep"):
        for overrides in page.get_sweep():
            page.config.update_from_flattened_dict(overrides)
            config.freeze(page.config)
    if hasattr(page, "HillClimb"):
        climb()
    if hasattr(page, "session"):
        check_session(page)


def check_session(page: types.ModuleType) -> None:
    """A plain session of ONNX Runtime made what the packed file makes of the same pixels."""
    packed = deploy.load_packed("runs/digits/qad_w4a4_kd/0/model.safetensors")
    data = packed.metadata["data"]
    images = (load_digits().images[..., None] - data["mean"]) / data["std"]
    np.testing.assert_allclose(page.outputs, packed(images.astype(np.float32)), atol=1e-4)
    assert page.taken["shape"] == ["batch", 8, 8, 1]
    assert page.taken["layout"] == "NHWC"


def climb() -> None:
    """A searcher keeps the budget, ends, and finds better policies than its first."""
    rng = np.random.default_rng(0)
    layers = [
        problem.Decision(name=f"layer_{i}", options=("W2", "W4", "W8"), places=((0.0, 0.0),) * 3)
        for i in range(5)
    ]
    student = problem.Decision(
        name="student", options=("kd",), places=((0.0, 0.0),), kind="student"
    )
    valid = np.ones((1, 6, 3), bool)
    valid[0, 0, 1:] = False
    costs = np.where(valid, [2.0, 4.0, 8.0], 0.0)
    costs[0, 0] = 0.0
    harm = rng.uniform(0.5, 2, 6)[:, None] * [1.0, 0.1, 0.01]
    posed = problem.Problem(
        decisions=(student, *layers),
        valid=valid,
        costs={"bits": costs},
        constants={"bits": np.zeros(1)},
        limits={"bits": 20.0},
        features=np.zeros((1, 6, 1), np.float32),
    )
    searcher, scores = searchers.make("hill_climb", posed, seed=0, evaluations=60), []
    while policies := searcher.propose():
        assert all(posed.feasible(policy) for policy in policies)
        new = [sum(harm[i, option] for i, option in enumerate(policy)) for policy in policies]
        searcher.observe(policies, new)
        scores += new
    assert len(scores) == 60
    assert min(scores) < 0.8 * scores[0]


@pytest.fixture(scope="module")
def parsed() -> dict[tuple[str, ...], str]:
    """{command of a program of kdq: what is wrong with it}."""
    found = [words for block in SHELL for words in blocks.commands(block.code)]
    found += [words for _, words in INLINE_COMMANDS]
    programs = dict.fromkeys(tuple(program(words)) for words in found if program(words))
    return {words: parse_commands.problem(list(words)) for words in programs}


def test_a_command_with_a_mistake_is_noticed():
    good = ["launch/compress.py", "--config=configs/digits.py", "--workdir=runs/digits"]
    assert parse_commands.problem(good) == ""
    for mistake, said in (("--confg=x", "confg"), ("x", "unknown arguments"), ("--arm=x", "arm")):
        assert said in parse_commands.problem([*good, mistake])
    assert "workdir" in parse_commands.problem(good[:2])


def program(words: list[str]) -> list[str]:
    """`launch/NAME.py` and its flags, if a command is one of kdq's programs."""
    for i, word in enumerate(words):
        if re.fullmatch(r"launch/\w+\.py", word) and re.fullmatch(r"\S*python3?", words[i - 1]):
            return words[i:]
    return []


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_commands_are_what_programs_take(parsed, block):
    found = blocks.commands(block.code)
    assert found, "no command"
    for words in found:
        if flags := program(words):
            assert parsed[tuple(flags)] == "", shlex.join(words)
        elif re.fullmatch(r"\S*pip", words[0]):
            assert words[1:3] == ["install", "-e"]
            assert extras(words[3]) <= declared_extras(), words[3]
        else:
            assert tuple(words) in EXACT, f"{shlex.join(words)}: no check for this command"


@pytest.mark.parametrize(
    ("name", "words"), INLINE_COMMANDS, ids=[f"{n}-{w[1]}" for n, w in INLINE_COMMANDS]
)
def test_commands_in_sentences_are_what_programs_take(parsed, name, words):
    assert parsed[tuple(program(words))] == "", shlex.join(words)


def test_extras_that_pages_name_are_declared():
    for path in blocks.PAGES:
        for text in re.findall(r"(?:\bkdq|'\.)\[[a-z,]+\]", path.read_text()):
            assert extras(text) <= declared_extras(), path


def extras(requirement: str) -> set[str]:
    found = re.search(r"\[(.*)\]", requirement)
    return set(found[1].split(",")) if found else set()


def declared_extras() -> set[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return set(parser["options.extras_require"])


def test_every_block_has_a_language_with_a_check():
    unchecked = [
        b.place for b in ALL if b.language not in ("python", "sh", "text") and not b.reason
    ]
    assert not unchecked, "want python, sh, or text for what is no code"


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: block.place)
def test_what_is_not_run_says_why(block):
    if block.language == "python" and "--8<--" not in block.code:
        compile(block.code, block.place, "exec")
    pytest.skip(block.reason)


def test_few_blocks_are_not_run():
    assert len(NOT_RUN) <= 4, [block.place for block in NOT_RUN]


def test_the_quickstart_is_readmes_program_in_under_30_lines():
    (program,) = [block.code for block in PYTHON if block.page == QUICKSTART]
    assert program in [block.code for block in PYTHON if block.page == "README.md"]
    assert len(program.strip().splitlines()) < 30
    assert len([line for line in program.splitlines() if line.strip()]) < 26


def test_blocks_are_found_with_their_reasons_and_lines():
    text = (
        "# A\n\n```python\nx = 1\n```\n\n- item:\n\n  ```sh\n  a \\\n      b && c  # why\n  ```\n\n"
        "<!-- not run: it is\nlong -->\n```python\ny\n```\n"
    )
    first, second, third = blocks.blocks(text, "page")
    assert (first.line, first.code, first.reason) == (4, "x = 1\n", "")
    assert (second.language, second.place) == ("sh", "page:10")
    assert blocks.commands(second.code) == [["a", "b"], ["c"]]
    assert third.reason == "it is\nlong"


@pytest.mark.slow
def test_the_tutorial_from_its_first_command_to_its_last(tmp_path, data_dir):
    """As a reader would: every command of the page, in order, in one folder."""
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "TFDS_DATA_DIR": str(data_dir), "PYTHONPATH": str(ROOT)}
    for block in (block for block in SHELL if block.page == "docs/tutorial.md"):
        for words in blocks.commands(block.code):
            if flags := program(words):
                command = [sys.executable, *flags]
                run = subprocess.run(
                    command, cwd=tmp_path, env=environment, capture_output=True, text=True
                )
                assert run.returncode == 0, run.stderr
    assert (tmp_path / "exported" / "model.onnx").is_file()
    assert (tmp_path / "runs" / "digits" / "table.md").is_file()
