"""Small networks of every kind in every format, run in its runtime, against their simulation."""

import json
from pathlib import Path

import pytest
import zoo
import zoo_export

from kdq import deploy

pytest.importorskip("jax2onnx")
pytest.importorskip("litert_converter")

PUBLISHED = Path(zoo.__file__).parent / "results" / "export_matrix.json"
# What failed before there was this zoo, one of each.
FAILED = {
    "max_pool 2x2": ("W8A8", "onnx"),
    "jnp.pad between layers": ("W8A8", "onnx"),
    "Conv CAUSAL, dilated": ("float", "onnx"),
    "two outputs, a dict": ("W8A8", "litert"),
    "concatenate": ("W4A8", "litert"),
}


def _check(which, cell):
    limit = zoo_export.EXACT if which.startswith("float") else zoo_export.OF_CODES
    assert "refused" not in cell, which
    assert cell["difference"] <= limit, which


@pytest.mark.parametrize("name", FAILED)
def test_what_failed(name):
    width, form = FAILED[name]
    ((_, _, cell),) = zoo_export.cells(zoo.ALL[name], [width], [form])
    _check(f"{width} {form}", cell)
    assert cell["agreement"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ALL)
def test_every_cell_runs_or_is_refused_as_published(name):
    published = json.loads(PUBLISHED.read_text())[name]
    for width, form, cell in zoo_export.cells(zoo.ALL[name]):
        which = f"{width} {form}"
        refused = published[which].get("refused")
        if refused is None:
            _check(which, cell)
        else:
            assert cell == {"refused": refused}, which
            assert "\n" not in refused


def test_the_zoo_has_what_it_names():
    assert len(zoo.ALL) >= 40
    assert len(zoo.ALL) == sum(len(networks) for networks in zoo.ZOO.values())


def test_the_page_shows_what_was_measured():
    """Every network has its cells, and the page is what the command makes of them."""
    figures = json.loads(PUBLISHED.read_text())
    assert set(figures) == set(zoo.ALL)
    whole = {f"{width} {form}" for width in zoo_export.WIDTHS for form in deploy.FORMATS}
    assert all(set(row) == whole for row in figures.values())
    page = (Path(zoo.__file__).parents[1] / "docs" / "deployment.md").read_text()
    assert zoo_export.markdown(figures) in page
