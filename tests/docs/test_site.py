"""The site: pages and results that are all in it; built without a warning, opened from disk."""

import contextlib
import importlib
import os
import re
import subprocess
import sys

import pytest
import yaml
from blocks import ROOT

DOCS = ROOT / "docs"
# What a page loads by itself; links to read on are none of it.
LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=[\"']?(https?:)?//"
    r"|<link\b[^>]*\bhref=[\"']?(https?:)?//|@import|url\([\"']?(https?:)?//"
)
PACKAGES = ("data", "deploy", "distill", "experiment", "models", "quantize")
# Values and types, of which griffe knows no docstring.
VALUES = {"FORMATS", "Lookup", "Record", "Scales", "Transforms", "Unit"}


def test_every_page_is_in_the_navigation():
    text = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text())
    listed = re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"]))
    assert len(set(listed)) == len(listed)
    assert sorted(listed) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def test_every_committed_table_and_record_is_listed():
    listed = set(re.findall(r"\]\(([\w.]+)\)", (DOCS / "results" / "README.md").read_text()))
    there = {p.name for p in (DOCS / "results").iterdir() if p.suffix in (".md", ".json")}
    assert listed == there - {"README.md"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    # Not --quiet, which hides warnings from --strict too.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", folder]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr
    return folder


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    files = [path for suffix in ("html", "css") for path in site.rglob(f"*.{suffix}")]
    assert len(files) > 40
    found = {str(p.relative_to(site)): LOADED.search(p.read_text()) for p in files}
    assert not {page: match[0] for page, match in found.items() if match}


def test_what_loads_from_elsewhere_would_be_found():
    for text in (
        '<script src="https://unpkg.com/x"></script>',
        "<link rel=stylesheet href=https://fonts.example/css>",
        "<img alt='' src='//example.org/a.png'>",
        "body { background: url(http://example.org/a.png) }",
    ):
        assert LOADED.search(text), text
    assert not LOADED.search('<a href="https://arxiv.org/abs/1503.02531">paper</a>')


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_what_packages_export(site, package):
    page = (site / "reference" / f"{package}.html").read_text()
    described = {path.rsplit(".", 1)[-1] for path in re.findall(r'id="(kdq[\w.]*)"', page)}
    exported = set(importlib.import_module(f"kdq.{package}").__all__)
    assert exported - described <= VALUES


@pytest.mark.slow
def test_pages_open_and_search_from_disk(site, chromium):
    complaints: list[str] = []
    with contextlib.closing(chromium.new_page()) as page:
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                complaints.append(request.url)
                if "://" in request.url and not request.url.startswith("file:")
                else None
            ),
        )
        for name in ("index", "quickstart", "reference/quantize", "results/digits"):
            page.goto((site / f"{name}.html").as_uri())
        page.keyboard.press("/")
        page.keyboard.type("AdaRound")
        page.wait_for_selector(".md-search-result__item", timeout=20_000)
        hits = page.locator(".md-search-result__item").all_inner_texts()
    assert any("Quantization" in hit for hit in hits)
    assert complaints == []
