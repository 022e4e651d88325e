"""Every notebook runs, claims included, and what is committed is what running it gives."""

import base64
import contextlib
import importlib.util
import io
import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = (
    "1_quickstart",
    "2_quantized_layer",
    "3_soft_targets",
    "4_kd_x_quantization",
    "5_mixed_precision",
    "6_deployment",
)
IN_A_KERNEL = "4_kd_x_quantization"  # the others in this process, which has imported kdq
MOST_BYTES = 400_000
# Of a machine: absolute paths, and what ipykernel calls the files of cells.
PRIVATE = re.compile(r"(?<![\w.])/(?:tmp|home|root|usr|opt|work|mnt|Users)/|ipykernel")


def load_execute():
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


execute = load_execute()


def committed(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shape_of(notebook):
    """What kinds of outputs each cell has, in order."""
    return [
        [(one.output_type, *sorted(one.get("data", {}))) for one in cell.outputs]
        for cell in code_cells(notebook)
    ]


def execute_here(path):
    """Returns a notebook with the outputs of its cells, which run in this process."""
    notebook = nbformat.read(path, as_version=4)
    namespace = {"__name__": "__main__"}
    with contextlib.chdir(path.parent):
        for count, cell in enumerate(code_cells(notebook), 1):
            cell.execution_count, cell.outputs = count, Outputs()
            namespace["display"] = cell.outputs.display
            with (
                contextlib.redirect_stdout(cell.outputs.writer("stdout")),
                contextlib.redirect_stderr(cell.outputs.writer("stderr")),
            ):
                exec(compile(cell.source, f"{path.name}, cell {count}", "exec"), namespace)
    return notebook


class Outputs(list):
    """What a cell shows and prints, in order; all that it prints stands where it begins to."""

    def display(self, shown):
        data, _ = DisplayFormatter().format(shown)
        encoded = {
            k: base64.b64encode(v).decode() if k == "image/png" else v for k, v in data.items()
        }
        self.append(nbformat.v4.new_output("display_data", data=encoded))

    def writer(self, name):
        def write(text):
            streams = [o for o in self if o.get("name") == name]
            if not streams:
                streams = [nbformat.v4.new_output("stream", name=name, text="")]
                self.extend(streams)
            streams[0].text += text
            return len(text)

        stream = io.StringIO()
        stream.write = write
        return stream


def test_all_of_them_are_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "5_mixed_precision" else n for n in NAMES],
)
def test_it_runs_and_gives_the_outputs_that_are_committed(name):
    """A claim that no longer holds is an assertion that fails in a cell."""
    run = execute.execute if name == IN_A_KERNEL else execute_here
    found = run(FOLDER / f"{name}.ipynb")
    assert shape_of(found) == shape_of(committed(name))
    check_outputs(found)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_clean(name):
    notebook = committed(name)
    nbformat.validate(notebook)
    check_outputs(notebook)
    assert os.path.getsize(FOLDER / f"{name}.ipynb") < MOST_BYTES
    # Writing it again would change nothing: no times, no paths of kernels, no other cell ids.
    assert execute.cleaned(committed(name)) == notebook


def check_outputs(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    pictures = 0
    for cell in cells:
        assert cell.outputs, f"no output: {cell.source[:80]}"
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result")
            assert output.get("name") != "stderr", output.text
            pictures += "image/png" in output.get("data", {})
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not PRIVATE.search(text), text
    assert pictures
    # It opens with a question, and ends with what follows.
    assert "**Question.**" in notebook.cells[0].source
    assert "**Conclusion.**" in notebook.cells[-1].source


def test_a_claim_that_does_not_hold_fails(tmp_path):
    path = tmp_path / "wrong.ipynb"
    cells = [nbformat.v4.new_code_cell("print(1)"), nbformat.v4.new_code_cell("assert 1 > 2")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="AssertionError"):
        execute.execute(path)


def test_what_differs_from_run_to_run_is_left_out(tmp_path):
    path = tmp_path / "one.ipynb"
    cell = nbformat.v4.new_code_cell("print(1)\nprint(2)", metadata={"tags": ["mine"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    execute.main([str(path)])
    once = path.read_bytes()
    execute.main([str(path)])
    assert path.read_bytes() == once
    assert nbformat.read(path, as_version=4).cells[0].outputs[0].text == "1\n2\n"
