"""The how-to pages explain every label that a verdict can have, and stay short."""

import re
from pathlib import Path

import pytest

from pyro_flows.infer.diagnostics import densities, verdict

HOWTO = Path(__file__).parent.parent / "docs" / "howto"


@pytest.mark.parametrize("page, labels", [("verdict.md", verdict.LABELS), ("density_verdict.md", densities.LABELS)])
def test_labels_are_explained(page, labels):
    rows = re.findall(r"^\| `([^`]+)` \| (?:yes|no) \|", (HOWTO / page).read_text(), re.MULTILINE)
    assert set(labels) == set(rows)


def test_pages_ask_one_question_and_are_short():
    offenders = []
    for page in HOWTO.glob("*.md"):
        lines = page.read_text().splitlines()
        title = lines[0]
        if not (title.startswith("# ") and title.endswith("?")) or len(lines) > 60:
            offenders.append(f"{page.name}: {title}, {len(lines)} lines")
    assert offenders == []
