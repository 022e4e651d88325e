"""Executes notebooks in place: python notebooks/execute.py [notebooks/1_quickstart.ipynb ...]

All of them if none is named. Needs kdq[notebooks], the last one kdq[onnx] too.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

FOLDER = Path(__file__).parent
# Of the kernel: figures and numbers that are made on a CPU, and no history in the user's home.
CPU = {"JAX_PLATFORMS": "cpu"}


def execute(path: Path) -> nbformat.NotebookNode:
    """A notebook with new outputs, without what differs from run to run; the file stays as it is.

    Raises nbclient.exceptions.CellExecutionError if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as home:
        client = nbclient.NotebookClient(
            notebook,
            timeout=600,
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
        )
        client.execute(env={**os.environ, **CPU, "IPYTHONDIR": home})
    return cleaned(notebook)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same without times, and the versions of who ran it."""
    for number, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{number}", {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main(names: list[str]) -> None:
    for path in map(Path, names) if names else sorted(FOLDER.glob("*.ipynb")):
        print(path)
        nbformat.write(execute(path), path)


if __name__ == "__main__":
    main(sys.argv[1:])
