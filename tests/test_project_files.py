# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Files that no program here reads: they parse, agree with each other, and name what exists."""

import re
from pathlib import Path

import pytest
import yaml

import gpstoken_hf

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def load(path):
    return yaml.safe_load((ROOT / path).read_text())


def make_targets():
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_citation():
    citation = load("CITATION.cff")
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert citation["version"] == declared[1] == gpstoken_hf.__version__
    paper = citation["preferred-citation"]
    assert paper["url"].endswith("2509.01109")
    assert all({"given-names", "family-names"} == set(author) for author in paper["authors"])


def test_workflow_runs_existing_targets_on_the_supported_pythons():
    job = load(".github/workflows/tests.yml")["jobs"]["tests"]
    versions = job["strategy"]["matrix"]["python-version"]
    assert all(isinstance(version, str) for version in versions)  # 3.10 without quotes is 3.1
    oldest = re.search(r'^requires-python = ">=(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert versions[0] == oldest[1]
    commands = "\n".join(step.get("run", "") for step in job["steps"])
    targets = re.findall(r"^make (.+)$", commands, re.MULTILINE)
    assert targets == ["lint docs", "test"]
    assert set(" ".join(targets).split()) <= make_targets()


def test_pre_commit_runs_tools_of_the_virtual_environment():
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for hook in repository["hooks"]:
        tool = re.match(r"\.venv/bin/python -m (ruff check|ruff format|mypy)\b", hook["entry"])
        assert tool, hook["entry"]
        assert f"-m {tool[1]}" in lint


@pytest.mark.parametrize("name", ["bug.md", "feature.md"])
def test_issue_templates_have_a_header(name):
    header = (ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text().split("---\n")[1]
    assert {"name", "about"} <= set(yaml.safe_load(header))


def nav_pages(entry):
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in nav_pages(value)]


def test_every_page_of_the_docs_is_in_the_nav():
    pages = nav_pages(load("mkdocs.yml")["nav"])
    assert len(set(pages)) == len(pages)
    assert set(pages) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_the_api_reference_has_every_public_name_once():
    found = [
        name
        for page in sorted((DOCS / "api").glob("*.md"))
        for name in re.findall(r"^::: gpstoken_hf\.(\w+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(found) == sorted(gpstoken_hf.__all__)


def test_every_target_is_described():
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split())
    described = set(re.findall(r"^([a-z-]+):.*## \S", makefile, re.MULTILINE))
    assert phony == described == make_targets()
    mentioned = re.findall(r"`make ([a-z -]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert set(" ".join(mentioned).split()) <= phony


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target
