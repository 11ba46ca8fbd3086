"""The Python blocks of the README and of the pages under docs/ run, each page in one namespace."""

import re
import sys
import types
import warnings
from pathlib import Path

import matplotlib
import pyro
import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted({*ROOT.glob("README.md"), *(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)})
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```[ \t]*$", re.MULTILINE | re.DOTALL
)


def blocks(text):
    """``(line, language, code)`` of each fenced block."""
    for found in FENCE.finditer(text):
        indent = len(found["indent"])
        code = "\n".join(line[indent:] for line in found["code"].splitlines())
        yield text.count("\n", 0, found.start()) + 2, found["language"].strip(), code + "\n"


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n\n1. b\n\n   ```python\n   y = x + 1\n   ```\n```\nno = code\n```\n"
    assert list(blocks(text)) == [(3, "python", "x = 1\n"), (9, "python", "y = x + 1\n"), (12, "", "no = code\n")]


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    code = [(line, source) for line, language, source in blocks(page.read_text()) if language == "python"]
    if not code:
        pytest.skip("no Python on this page")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before = torch.get_default_dtype()
    # A module of its own, so that classes defined on the page can be pickled.
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for line, source in code:
                # Blank lines before it, so that a traceback names the page's own line.
                exec(compile("\n" * (line - 1) + source, str(page), "exec"), module.__dict__)
    finally:
        torch.set_default_dtype(before)
        pyro.clear_param_store()


def test_links_to_files_lead_somewhere():
    offenders = []
    for page in PAGES:
        prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
        targets = [t for t in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose) if not re.match(r"[a-z]+:", t)]
        offenders += [f"{page}: {target}" for target in targets if not (page.parent / target).exists()]
    assert offenders == []


def test_ci_runs_the_set_up_commands_of_the_readme():
    """The first as it stands, and the second last, so that the closing line of pytest ends the output."""
    readme = (ROOT / "README.md").read_text()
    first, second, *_ = [code.strip() for _, language, code in blocks(readme) if language == "sh"]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert f"({first})" in lines and lines[-1] == f"({second})"
