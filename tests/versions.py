"""Runs the tests with the oldest and the newest versions of what the package needs, each in an environment of its own.

    python tests/versions.py                                     # all of them, with the unmarked tests
    python tests/versions.py lowest 3.13 -- tests/test_bridge.py # some of them, with the arguments of pytest after --

The environments stay in .venv-versions/ and are brought up to date by the next run.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The interpreter and the constraints of each. ArviZ 0.23 is the last for Python 3.11; 1.x needs Python 3.12.
VERSIONS = {
    "lowest": ("3.11", "constraints-lowest.txt"),
    "3.11": ("3.11", "constraints.txt"),
    "3.12": ("3.12", "constraints-3.12.txt"),
    "3.13": ("3.13", "constraints-3.12.txt"),
}


def interpreter(version):
    """A command that runs this Python: one that is on the path, or one of pyenv's."""
    for command in (f"python{version}", *sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))):
        found = shutil.which(command)
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    raise SystemExit(f"tests/versions.py: expected python{version} on the path or in ~/.pyenv/versions; install it")


def tested(name, arguments):
    """The exit code of the tests with these versions."""
    version, constraints = VERSIONS[name]
    home = ROOT / ".venv-versions" / name
    subprocess.run([interpreter(version), "-m", "venv", home], check=True)
    python = home / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "-c", ROOT / "tests" / constraints, "-e", f"{ROOT}[test]"]
    subprocess.run([python, *install], check=True)
    said = (
        "import sys, arviz, numpy; print('Python', sys.version, 'ArviZ', arviz.__version__, 'NumPy', numpy.__version__)"
    )
    subprocess.run([python, "-c", said], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, env=environment).returncode


def main():
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    names, arguments = words[:cut] or list(VERSIONS), words[cut + 1 :]
    if unknown := set(names) - set(VERSIONS):
        raise SystemExit(f"tests/versions.py: expected some of {', '.join(VERSIONS)}, got {', '.join(sorted(unknown))}")
    codes = {}
    for name in names:
        print(f"== {name}", flush=True)
        codes[name] = tested(name, arguments)
    for name, code in codes.items():
        print(f"{name}: {'passed' if code == 0 else f'pytest ended with {code}'}")
    raise SystemExit(max(codes.values()))


if __name__ == "__main__":
    main()
