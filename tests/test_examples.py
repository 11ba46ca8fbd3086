"""Every script under examples/ runs, found by looking: a new one is tested without being listed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for path in (ROOT / "examples").rglob("*.py") if not path.name.startswith("_"))


def run(script, cwd, *arguments, launcher=("-W", "error")):
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "TMPDIR": str(cwd)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *launcher, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def test_there_are_examples():
    assert ROOT / "examples" / "quickstart.py" in SCRIPTS


@pytest.mark.full
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_smoke(script, tmp_path):
    done = run(script, tmp_path, "--smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "an example that says nothing"


@pytest.mark.full
def test_two_processes_give_the_numbers_of_one(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ROOT / "examples" / "distributed.py"
    one, two = (run(script, tmp_path, "--smoke", **options) for options in ({}, {"launcher": launcher}))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    scores = [re.search("not seen: (.*) nats", done.stdout).group(1) for done in (one, two)]
    assert scores[0] == scores[1] and "2 processes; verdict" in two.stdout


@pytest.mark.full
def test_quickstart_leaves_three_pictures_where_it_is_told(tmp_path):
    done = run(ROOT / "examples" / "quickstart.py", tmp_path, "--smoke", "--out", "pictures")
    assert done.returncode == 0, done.stderr
    names = {"quickstart_density.png", "quickstart_conditional.png", "quickstart_posterior.png"}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names
    assert names == {path.name for path in (ROOT / "docs" / "pictures").glob("quickstart_*.png")}
    assert "Score of hours not seen" in done.stdout and "Weights of 10,000 draws" in done.stdout
    assert len((ROOT / "examples" / "quickstart.py").read_text().splitlines()) < 120


def test_stored_pictures_are_small():
    for path in (ROOT / "docs" / "pictures").iterdir():
        assert path.stat().st_size < 300_000, path.name


def test_every_stored_picture_is_on_a_page():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"pictures/([\w.]+)", page.read_text())}
    assert {path.name for path in (ROOT / "docs" / "pictures").iterdir()} <= shown


def test_every_data_file_has_its_source():
    source = (ROOT / "examples" / "data" / "SOURCE.txt").read_text()
    for path in (ROOT / "examples" / "data").iterdir():
        assert path.name == "SOURCE.txt" or path.name in source
    assert "CC BY 4.0" in source
