"""Sets up lmjax with nothing but Python's standard library, then runs something in it.

    python3 bootstrap.py experiments.quickstart [flags]   any module of the project
    python3 bootstrap.py test                             lint, types, documentation and tests

The first call makes a virtual environment in .venv beside this file and installs lmjax with the
versions of constraints.txt; later calls find it ready. `test` also installs what testing needs.
Set LMJAX_VENV to put the environment elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = Path(os.environ.get("LMJAX_VENV", ROOT / ".venv"))
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CHECKS = (
    ("-m", "ruff", "check", "."),
    ("-m", "ruff", "format", "--check", "."),
    ("-m", "mypy"),
    ("-m", "mkdocs", "build", "--strict", "--quiet"),
    ("-m", "pytest"),
)


def main(arguments: list[str]) -> int:
    """Runs a module, or the checks, in the environment; returns its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print(
            f"error: lmjax runs on Python 3.11 to 3.13, not {sys.version.split()[0]}",
            file=sys.stderr,
        )
        return 2
    if arguments[0] != "test":
        install("")
        command = [str(PYTHON), "-m", *arguments]
        if os.name == "posix":  # become the run: signals reach it, and it may take its time to save
            os.execv(PYTHON, command)
        return subprocess.call(command)
    install("[test]")
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")  # its notice of a successor
    for check in CHECKS:
        extra = arguments[1:] if check[-1] == "pytest" else []
        print("+", " ".join(check), *extra, flush=True)
        code = subprocess.call([PYTHON, *check, *extra], cwd=ROOT)
        if code:
            return code
    return 0


def install(extra: str) -> None:
    """Brings the environment to what pyproject.toml and constraints.txt ask for, if it is not."""
    wanted = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    ).hexdigest()
    marker = ENVIRONMENT / f"installed{extra}.txt"
    if marker.exists() and marker.read_text() == wanted:
        return
    print(f"installing lmjax{extra} into {ENVIRONMENT} (once, about a minute)", file=sys.stderr)
    if not any(ENVIRONMENT.glob("[Ll]ib/**/site-packages/pip")):  # new, or interrupted earlier
        venv.create(ENVIRONMENT, with_pip=True)
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *constraints, "--editable", f"{ROOT}{extra}"], check=True)
    marker.write_text(wanted)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        print(
            f"error: installing failed with exit code {error.returncode}; see above",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
