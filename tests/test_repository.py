"""What surrounds the code: one version, workflows that call targets which exist, a citation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import acnet_kernels

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def parsed(path: Path):
    yaml = pytest.importorskip("yaml", reason="PyYAML, which reads the files, is not installed")
    return yaml.safe_load(path.read_text())


def test_the_version_is_in_one_place():
    version = acnet_kernels.__version__
    assert 'version = { attr = "acnet_kernels.__version__" }' in (ROOT / "pyproject.toml").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    for name in ("pyproject.toml", "setup.py", "CITATION.cff", "README.md", "mkdocs.yml"):
        assert f'"{version}"' not in (ROOT / name).read_text(), name


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_that_exist(workflow):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = [step for job in parsed(workflow)["jobs"].values() for step in job["steps"]]
    called = {match for step in steps for match in re.findall(r"make ([a-z-]+)", step.get("run", ""))}
    assert called <= targets
    assert called or workflow.stem not in ("ci", "wheels", "docs", "gpu")
    for step in steps:
        for path in re.findall(r"(?:tools|benchmarks)/\S+\.(?:py|sh)", step.get("run", "")):
            assert (ROOT / path).exists()


def test_the_other_files_are_what_their_readers_take():
    found = parsed(ROOT / "CITATION.cff")
    assert found["cff-version"] == "1.2.0"
    assert found["authors"] == [{"name": "the acnet_kernels authors"}]
    hooks = {hook["id"] for repo in parsed(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]}
    assert hooks == {"ruff-check", "ruff-format", "mypy", "clang-format", "codespell"}
    for template in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert parsed(template)
    assert (ROOT / "acnet_kernels" / "py.typed").exists()
