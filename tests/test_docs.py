"""The Python blocks of the README and of docs/ run, each page in one namespace, and print what the page shows.

A block that prints is followed by its output, a block of text after a comment that says how near its numbers are:

    <!-- printed; numbers within 20 % -->

Without ``; numbers ...`` the output is exact.
"""

import contextlib
import io
import re
import sys
import types
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGES = sorted({*ROOT.glob("README.md"), *(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)})
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```[ \t]*$", re.MULTILINE | re.DOTALL
)
PRINTED = re.compile(
    r"\s*?\n(?P<indent> *)<!-- printed(?:; numbers within (?P<percent>\d+) %)? -->\n"
    r"(?P=indent)```text\n(?P<text>.*?)^(?P=indent)```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:e[+-]?\d+)?(?!\w)")


def dedented(code, indent):
    return "".join(line[indent:] + "\n" for line in code.splitlines())


def blocks(text):
    """``(line, language, code, match)`` of each fenced block."""
    for found in FENCE.finditer(text):
        code = dedented(found["code"], len(found["indent"]))
        yield text.count("\n", 0, found.start()) + 2, found["language"].strip(), code, found


def reads(printed, expected, percent):
    """Whether ``printed`` is ``expected``: word by word, and numbers within ``percent``, if that is given.

    A sign is part of the words. Spaces, and where an indented text is broken, move with the width of numbers, so they
    count only without ``percent``.
    """
    if percent is None:
        return [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in expected.splitlines()]
    words, numbers = [], []
    for text in (re.sub(r"\n {4,}(?=\S)", " ", text) for text in (printed, expected)):
        words.append([NUMBER.sub("0", line).split() for line in text.splitlines()])
        numbers.append([float(found.replace(",", "")) for found in NUMBER.findall(text)])
    near = (abs(a - b) <= percent / 100 * abs(b) for a, b in zip(*numbers, strict=True))
    return words[0] == words[1] and all(near)


def compared(text, printed):
    """What differs, and the page with the outputs that came. ``printed`` holds one text for each Python block."""
    python = [(line, fence) for line, language, _, fence in blocks(text) if language == "python"]
    differences, parts, end = [], [], 0
    for (line, fence), came in zip(python, printed, strict=True):
        shown = PRINTED.match(text, fence.end())
        percent = "20" if shown is None else shown["percent"]
        expected = dedented(shown["text"], len(shown["indent"])) if shown else ""
        parts.append(text[end : fence.end()])
        end = shown.end() if shown else fence.end()
        if reads(came, expected, percent and int(percent)):
            parts.append(text[fence.end() : end])
            continue
        differences.append(f"line {line}: expected the output\n{expected}got\n{came}")
        if came:
            within = f"; numbers within {percent} %" if percent else ""
            lines = ["", f"<!-- printed{within} -->", "```text", *map(str.rstrip, came.splitlines()), "```"]
            parts.append("".join("\n" + (fence["indent"] + line if line else "") for line in lines))
    return differences, "".join([*parts, text[end:]])


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n\n1. b\n\n   ```python\n   y = x + 1\n   ```\n```\nno = code\n```\n"
    found = [(3, "python", "x = 1\n"), (9, "python", "y = x + 1\n"), (12, "", "no = code\n")]
    assert [block[:3] for block in blocks(text)] == found


PAGE = """
- item

  ```python
  print("x")
  ```

  <!-- printed; numbers within 20 % -->
  ```text
  mean 1,000.0, sd -2.5e-01 (60%) of x1
  end
  ```

```python
y = 1
```
```text
not an output
```
"""


@pytest.mark.parametrize(
    "came",
    [
        "mean 1,000.0, sd -2.5e-01 (60%) of x1\nend\n",
        "mean 850, sd -0.21 (71%) of x1\nend\n",
        "mean   1199.00, sd -0.25 (60%) of x1   \nend",
        "mean 1,000.0, sd -0.25 (60%)\n    of x1\nend\n",
    ],
)
def test_outputs_that_agree(came):
    assert compared(PAGE, [came, ""]) == ([], PAGE)


@pytest.mark.parametrize(
    "came",
    [
        "mean 1,300.0, sd -2.5e-01 (60%) of x1\nend\n",  # a number
        "mean 1,000.0, sd -3.5e-01 (60%) of x1\nend\n",
        "mean 0, sd -0.25 (60%) of x1\nend\n",
        "mean nan, sd -0.25 (60%) of x1\nend\n",
        "mean 1,000.0, sd 2.5e-01 (60%) of x1\nend\n",  # a sign
        "Mean 1,000.0, sd -0.25 (60%) of x1\nend\n",  # a word
        "mean 1,000.0, sd -0.25 (60%) of x2\nend\n",
        "mean 1,000.0, sd -0.25 (60%) of x1\n",  # a line
        "mean 1,000.0, sd -0.25 (60%) of x1\n\nend\n",
        "mean 1,000.0, sd -0.25 (60%) of x1 end\n",
        "mean 1,000.0, sd -0.25 (60%) of\nx1\nend\n",
        "mean 1,000.0, sd -0.25 (60%) of x1\nend\n2\n",
        "",
    ],
)
def test_outputs_that_differ(came):
    differences, page = compared(PAGE, [came, ""])
    assert len(differences) == 1 and came in differences[0]
    assert compared(page, [came, ""]) == ([], page)  # refreshed
    assert page.endswith(PAGE.partition("```\n\n```")[2])


def test_outputs_that_are_exact_or_not_shown():
    exact = PAGE.replace("; numbers within 20 %", "")
    assert compared(exact, ["mean 1,000.0, sd -2.5e-01 (60%) of x1\nend\n", ""]) == ([], exact)
    for came in ("mean 1,000.1, sd -2.5e-01 (60%) of x1\nend\n", "mean  1,000.0, sd -2.5e-01 (60%) of x1\nend\n"):
        assert len(compared(exact, [came, ""])[0]) == 1
    differences, page = compared(PAGE, ["mean 1,000.0, sd -0.25 (60%) of x1\nend\n", "1\n\n2\n"])
    assert (
        len(differences) == 1 and "```\n\n<!-- printed; numbers within 20 % -->\n```text\n1\n\n2\n```\n```text" in page
    )


def other(path, stored):
    """Whether two pictures differ in size, or clearly in more than a twentieth of their areas of 10 by 10 pixels."""
    if not stored.exists():
        return True
    with Image.open(path) as a, Image.open(stored) as b:
        if a.size != b.size:
            return True
        coarse = [np.asarray(image.convert("RGB").reduce(10)).astype(float) for image in (a, b)]
    return (np.abs(coarse[0] - coarse[1]).max(-1) > 40).mean() > 0.05


def test_pictures_that_differ(tmp_path):
    rows = np.full((100, 200, 3), 255, np.uint8)
    moved, wide = rows.copy(), np.full((100, 210, 3), 255, np.uint8)
    moved[:30, :100] = 0
    for name, pixels in (("rows", rows), ("moved", moved), ("wide", wide)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    found = [other(tmp_path / "rows.png", tmp_path / f"{name}.png") for name in ("rows", "moved", "wide", "none")]
    assert found == [False, True, True, True]


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch, request):
    """Every block runs, and prints what the page shows; ``--refresh-outputs`` writes what it prints into the page."""
    text = page.read_text()
    code = [(line, source) for line, language, source, _ in blocks(text) if language == "python"]
    if not code:
        pytest.skip("no Python on this page")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # pages read examples/data, as from the repository's root
    matplotlib.use("Agg")
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before = torch.get_default_dtype()
    # A module of its own, so that classes defined on the page can be pickled.
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    printed = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for line, source in code:
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    # Blank lines before it, so that a traceback names the page's own line.
                    exec(compile("\n" * (line - 1) + source, str(page), "exec"), module.__dict__)
                printed.append(output.getvalue())
    finally:
        torch.set_default_dtype(before)
        pyro.clear_param_store()
    plt.close("all")
    differences, refreshed = compared(text, printed)
    pictures = {path: ROOT / "docs" / "pictures" / path.name for path in tmp_path.glob("*.png") if path.name in text}
    if request.config.getoption("--refresh-outputs"):
        page.write_text(refreshed)
        for path, stored in pictures.items():
            with Image.open(path) as image:  # few colors make a small file
                image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(stored, optimize=True)
    else:
        differences += [
            f"{stored.name} is not what the page draws" for p, stored in pictures.items() if other(p, stored)
        ]
        remedy = f"see what came, then refresh: pytest -m full tests/test_docs.py -k {page.stem} --refresh-outputs"
        assert not differences, "\n".join([*differences, remedy])


def test_every_output_follows_its_block():
    """A comment ``<!-- printed ... -->`` that is worded otherwise, or stands elsewhere, would not be checked."""
    offenders = []
    for page in PAGES:
        text = page.read_text()
        read = {
            shown.start(0) + shown[0].index("<!--")
            for _, language, _, fence in blocks(text)
            if language == "python" and (shown := PRINTED.match(text, fence.end()))
        }
        offenders += [
            f"{page}:{text.count(chr(10), 0, found.start()) + 1}"
            for found in re.finditer("<!-- *print", text, re.IGNORECASE)
            if found.start() not in read
        ]
    assert offenders == []


def anchors(page):
    """What ``page#anchor`` may name: its headings, as GitHub and MyST turn them into anchors."""
    prose = FENCE.sub("", page.read_text())
    names = re.findall(r"^\(([\w-]+)\)=$", prose, re.MULTILINE)
    for heading in re.findall(r"^#+ +(.*?) *#*$", prose, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        names.append(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return names


def test_links_lead_somewhere():
    offenders = []
    for page in PAGES:
        prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
        targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
        for target in targets:
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
                offenders.append(f"{page}: {target}")
    assert offenders == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_ci_runs_the_set_up_commands_of_the_readme():
    """The first as it stands, and the second last, so that the closing line of pytest ends the output."""
    readme = (ROOT / "README.md").read_text()
    first, second, *_ = [code.strip() for _, language, code, _ in blocks(readme) if language == "sh"]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert f"({first})" in lines and lines[-1] == f"({second})"
