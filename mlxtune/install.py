"""How this copy of mlxtune was installed: what adds to it, what mends it, what starts it.

Where it came from is what pip notes in `direct_url.json` (PEP 610).
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mlxtune.errors import PackageMissing

NAME = "mlxtune"
# The folder that holds the package: a checkout has its pyproject.toml beside it.
_ROOT = Path(__file__).parents[1]


def install_extra(extra: str) -> str:
    """The command that adds an extra, such as `prep`, to this copy of mlxtune."""
    if _is_checkout(_ROOT):
        return pip_install("-e", f"{_brief(_ROOT)}[{extra}]")
    installed = _installed()
    if installed is None:
        return pip_install(f"{NAME}[{extra}]")
    origin = _origin(installed)
    if origin is None:  # from an index, which has it still
        return pip_install(f"{NAME}[{extra}]")
    if (source := _source(origin, extra)) is not None:
        return pip_install(source)
    return pip_install(*_packages_of(installed, extra))  # its folder or wheel is gone


def pip_install(*what: str) -> str:
    """The command that installs packages where this Python finds them.

    Args:
        what: options and packages, as pip takes them.
    """
    python = _brief(Path(sys.executable))
    command = [python, "-m", "pip", "install"]
    if importlib.util.find_spec("pip") is None:  # as in the environments that uv makes
        command = ["uv", "pip", "install", "--python", python]
    return shlex.join([*command, *what])


def program() -> str:
    """How mlxtune is called from this folder: by its name only if the shell finds this copy."""
    script = Path(sys.executable).parent / NAME
    if not script.is_file():
        return f"{shlex.quote(_brief(Path(sys.executable)))} -m {NAME}"
    found = shutil.which(NAME)
    if found is not None and Path(found).resolve() == script.resolve():
        return NAME
    return shlex.quote(_brief(script))


def explained(error: ImportError) -> PackageMissing | None:
    """What to tell people of a package that cannot be imported; None if it is our own."""
    package = _package_of(error)
    if package in ("", NAME):
        return None
    if package == "mlx":
        return PackageMissing(f"MLX cannot be loaded: {error}", remedy=_mlx_remedy())
    return PackageMissing(
        f"the package {package} cannot be loaded: {error}",
        remedy=pip_install("--upgrade", "--force-reinstall", package.replace("_", "-")),
    )


def _package_of(error: ImportError) -> str:
    """The top package that failed: a compiled module gives the last part of its name alone."""
    if error.path:
        file = Path(error.path).absolute()
        folders = [Path(entry).absolute() for entry in sys.path]
        around = [folder for folder in folders if file.is_relative_to(folder)]
        if around:
            nearest = max(around, key=lambda folder: len(folder.parts))
            return file.relative_to(nearest).parts[0].partition(".")[0]
    return (error.name or "").partition(".")[0]


def _mlx_remedy() -> str:
    if platform.system() == "Linux":
        return f"{install_extra('cpu')}    (with an NVIDIA GPU: cuda in the place of cpu)"
    if platform.machine() != "arm64":
        return "install a Python for Apple silicon: under Rosetta MLX does not run"
    return pip_install("--upgrade", "--force-reinstall", "mlx")


def _is_checkout(folder: Path) -> bool:
    project = folder / "pyproject.toml"
    return project.is_file() and f'name = "{NAME}"' in project.read_text(encoding="utf-8")


def _brief(path: Path) -> str:
    """A path as one types it here: relative if it is below the folder that one is in."""
    path = path.absolute()  # a link, as .venv/bin/python is, stays one
    if not path.is_relative_to(Path.cwd()):
        return str(path)
    brief = str(path.relative_to(Path.cwd()))
    # A mere name would be looked for on the PATH, or in an index of packages.
    return brief if os.sep in brief or brief == "." else f".{os.sep}{brief}"


def _installed() -> Distribution | None:
    try:
        return distribution(NAME)
    except PackageNotFoundError:
        return None


def _origin(installed: Distribution) -> dict[str, Any] | None:
    """What direct_url.json says; None for a package from an index."""
    text = installed.read_text("direct_url.json")
    return dict(json.loads(text)) if text else None


def _source(origin: dict[str, Any], extra: str) -> str | None:
    """What pip takes for the same copy with an extra; None if that is no longer there."""
    url = str(origin["url"])
    if (version_control := origin.get("vcs_info")) is not None:
        at = version_control.get("requested_revision") or version_control["commit_id"]
        return f"{NAME}[{extra}] @ {version_control['vcs']}+{url}@{at}"
    if not url.startswith("file:"):
        return f"{NAME}[{extra}] @ {url}"
    path = Path(url2pathname(urlsplit(url).path))
    return f"{_brief(path)}[{extra}]" if path.exists() else None


def _packages_of(installed: Distribution, extra: str) -> list[str]:
    """The packages of an extra, as the installed metadata names them."""
    named = re.compile(rf"""extra\s*==\s*['"]{re.escape(extra)}['"]""")
    lines = [line.partition(";") for line in installed.requires or ()]
    return [what.strip() for what, _, condition in lines if named.search(condition)]
