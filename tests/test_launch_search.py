"""launch/search.py and launch/cost_table.py as a user runs them, on a narrowed shipped config."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import refusal, run

from kdq import files
from kdq.deploy import load_packed
from kdq.quantize.layers import layer_bits
from kdq.search.bank import bits_of

slow = pytest.mark.slow
ROOT = Path(__file__).parents[1]

# A config file of a user's own: it narrows the one that kdq ships to what is needed.
NARROWED = f"""
import runpy

def get_config(arg=None):
    config = runpy.run_path({str(ROOT / "configs" / "search_digits.py")!r})["get_config"](arg)
    for name in list(config.arms):
        if name not in ("teacher", "kd", "qad_w3a8"):
            del config.arms[name]
    config.searches = {{}}
    config.models.teacher.widths = (8, 8)
    config.models.student.widths = (4, 6)
    config.search.choices = ("W2A8", "W8A8")
    config.search.evaluations = 10
    config.search.examples = 100
    config.quantize.calibration_examples = 64
    config.evaluations = 2
    return config
"""
NAMES = ("random", "knapsack")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "narrowed.py"
    path.write_text(NARROWED)
    return path


@pytest.fixture(scope="module")
def launch(data_dir):
    """Runs a script of launch/ from the root of the repository."""
    environment = os.environ | {"TFDS_DATA_DIR": str(data_dir)}

    def start(script, *arguments):
        command = [sys.executable, f"launch/{script}.py", *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550
        )

    start.data_dir = str(data_dir)
    return start


@pytest.fixture(scope="module")
def searched(launch, config, tmp_path_factory):
    """`(process, folder)` of two methods, one after the other; the process of the second."""
    pytest.importorskip("jax2onnx")
    workdir = tmp_path_factory.mktemp("launch") / "run"
    command = (f"--config={config}:quick", f"--workdir={workdir}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", launch.data_dir)
        assert run("search", *command, f"--config.search.method={NAMES[0]}") is None
    return launch("search", *command, f"--config.search.method={NAMES[1]}"), workdir


@pytest.fixture
def program(data_dir, monkeypatch, capsys):
    """Runs a script of launch/ in this process; returns what it prints."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))

    def start(script, *arguments):
        assert run(script, *arguments) is None
        return capsys.readouterr().out

    return start


@slow
def test_methods_join_one_table(searched):
    process, workdir = searched
    assert process.returncode == 0, process.stderr
    records = {r["arm"]: r for r in json.loads((workdir / "results.json").read_text())}
    arms = [f"{name}_{stage}" for name in NAMES for stage in ("ptq", "qad")]
    assert set(arms) <= set(records)
    table = (workdir / "table.md").read_text()
    printed = process.stdout
    for arm in arms:
        assert records[arm]["status"] == "ok"
        stage = arm.rsplit("_", 1)[1]
        row = next(line for line in table.splitlines() if line.startswith(f"| {arm} |"))
        assert f"{100 * records[arm]['metrics']['test']['accuracy']:.2f}" in row
        assert records[arm]["kind"] == {"ptq": "PTQ", "qad": "QAD"}[stage]
        file = workdir / arm / "0" / "model.safetensors"
        packed = load_packed(file)
        for path, bits in records[arm]["policy"].items():
            own = {**packed.weight_quantizers.get(path, {}), **packed.qparams.get(path, {})}
            assert layer_bits({path: own}, path) == bits_of(bits)
    # What the last one found is printed, layer by layer.
    for path, bits in records["knapsack_qad"]["policy"].items():
        assert any(line.split()[:2] == [path, bits] for line in printed.splitlines())
    # Both stand beside the same uniform bits.
    told = records["knapsack_qad"]["search"]
    assert {records[f"{name}_qad"]["reference"] for name in NAMES} == {"uniform_qad"}
    uniform = records["uniform_qad"]["search"]
    assert told["uniform"]["scores"] == uniform["scores"]
    objective = [f"{uniform['scores']['kl']:.4g}"]
    assert ["kl,", "uniform", "bits", *objective] in [line.split() for line in printed.splitlines()]
    same = told["chosen"] == uniform["chosen"]
    policy = "the same policy as" if same else "another policy than"
    said = f"knapsack found {policy} uniform with seed 0"
    assert said in printed
    assert said in table
    assert said in (workdir / "searches.md").read_text()
    limit = f"{told['costs']['average_bits']:.4g} of 3"
    assert any(" ".join(line.split()) == f"average_bits {limit}" for line in printed.splitlines())


@slow
def test_what_was_trained_is_exported(searched):
    _, workdir = searched
    for name in NAMES:
        entry = json.loads((workdir / f"{name}_qad" / "0" / "result.json").read_text())["exports"]
        folder = workdir / f"{name}_qad" / "0" / "export"
        assert list(entry) == ["onnx"]
        assert len(list(folder.glob("*.onnx"))) == 1
        assert entry["onnx"]["argmax_agreement"] > 0.95
        assert not (workdir / f"{name}_ptq" / "0" / "export").exists()


@slow
def test_the_same_command_again_searches_nothing(searched, program, config):
    _, workdir = searched
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("evaluations-*.jsonl")}
    assert len(before) == 3  # of the two methods, and of the uniform bits of both
    program(
        "search",
        *(f"--config={config}:quick", f"--workdir={workdir}", "--config.search.method=knapsack"),
    )
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("evaluations-*.jsonl")} == before


@slow
def test_a_measured_table_is_taken_for_a_search(searched, program, config, tmp_path):
    _, workdir = searched
    path = tmp_path / "costs.json"
    how = f"--config={config}:quick", "--metrics=size"
    output = program("cost_table", *how, f"--out={path}")
    table = files.read_json(path)
    assert set(table["metrics"]["size"]["layers"]) == {"conv_0", "conv_1", "head"}
    size = table["metrics"]["size"]
    shown = [line.split() for line in output.splitlines() if line.split()]
    of_head = [f"{size['layers']['head'][bits]:.5g}" for bits in ("W2A8", "W8A8")]
    assert ["head", *of_head] in shown
    # Something that only this file says: a search goes by it.
    size["constant"] += 50_000
    path.write_text(json.dumps(table))
    program(
        "search",
        *(f"--config={config}:quick", f"--workdir={workdir}", "--name=by_table"),
        *("--config.search.method=uniform", f"--config.search.cost_tables=('{path}',)"),
    )
    found = json.loads((workdir / "searches" / "by_table" / "0" / "result.json").read_text())
    assert found["costs"]["size"] > 50_000


MISTAKES = {
    "method": (
        ("--config.search.method=knapsak",),
        "error: unknown config.search.method: 'knapsak' (did you mean 'knapsack'?)",
    ),
    "taken": (("--name=qad", "--config.search.finetune=nobody"), "error: unknown config.search.fi"),
    "budget": (
        ("--config.search.most.average_bits=-1.0",),
        "error: config.search.most.average_bits=-1.0: ",
    ),
    "key": (("--config.search.most.bits=3.0",), "error: unknown key in config.search.most: 'bits'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_one_line(config, data_dir, monkeypatch, tmp_path, mistake):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    arguments, message = MISTAKES[mistake]
    where = f"--config={config}:quick", f"--workdir={tmp_path / 'run'}"
    answer = refusal("search", *where, *arguments)
    assert answer.startswith(message)
    assert "\n" not in answer
    assert not (tmp_path / "run").exists()


def test_an_unknown_metric_of_a_table(config, data_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    how = f"--config={config}:quick", f"--out={tmp_path / 'costs.json'}"
    assert refusal("cost_table", *how, "--metrics=sizes") == (
        "error: unknown metric 'sizes' (did you mean 'size'?); valid: size, latency"
    )
