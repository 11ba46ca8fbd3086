"""Builds the source distribution and the wheel, installs the wheel, and runs README's first two examples with it.

    python tests/wheel.py           # in an environment beside the active one, whose packages it uses
    python tests/wheel.py --clean   # in an environment that downloads what the wheel requires

Everything happens in a temporary folder, out of reach of the checkout.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"pyro_flows", "pyproject.toml", "PKG-INFO", ".gitignore"}
SOURCES |= {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"}
CHECK = """
from importlib.metadata import version
from pathlib import Path
import pyro_flows

home = Path(pyro_flows.__file__).parent
assert "site-packages" in home.parts, home
assert (home / "py.typed").exists(), "no py.typed"
assert version("pyro-flows") == pyro_flows.__version__
print("pyro_flows", pyro_flows.__version__, "of", home)
"""


def run(*command, **options):
    subprocess.run([str(part) for part in command], check=True, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", action="store_true", help="download what the wheel requires")
    clean = parser.parse_args().clean
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT)
        (wheel,), (source,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
        with tarfile.open(source) as archive:
            kept = {Path(member).parts[1] for member in archive.getnames()}
        assert kept == SOURCES, kept ^ SOURCES
        for path in (wheel, source):
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")

        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", wheel, *([] if clean else ["--no-deps"]))
        if not clean:  # after the wheel; an editable install of the active environment is not followed from here
            (site,) = (folder / "venv" / "lib").glob("*/site-packages")
            (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")

        examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[:2]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"MPLBACKEND": "Agg"}
        for code in (CHECK, "\n".join(examples)):
            run(python, "-W", "error", "-c", code, cwd=folder, env=environment)


if __name__ == "__main__":
    main()
