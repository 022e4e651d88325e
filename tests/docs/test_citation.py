"""CITATION.cff: what the Citation File Format 1.2.0 asks for, and what setup.cfg says too."""

import configparser
import re

import yaml
from blocks import ROOT

import kdq

REQUIRED = {"authors", "cff-version", "message", "title"}
ALLOWED = {*REQUIRED, "abstract", "keywords", "license", "type", "version"}


def test_it_is_citation_file_format():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= REQUIRED
    assert citation.keys() <= ALLOWED
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    for author in citation["authors"]:  # an entity has a name, a person parts of one
        assert author.keys() == {"name"}
    assert all(isinstance(word, str) for word in citation["keywords"])
    assert len(set(citation["keywords"])) == len(citation["keywords"])


def test_it_says_what_the_package_says():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    assert citation["version"] == kdq.__version__ == parser["metadata"]["version"]
    assert citation["license"] == parser["metadata"]["license"]
    description = re.sub(r", in JAX and Flax$", "", parser["metadata"]["description"])
    assert citation["title"].lower() == f"kdq: {description.lower()}"
