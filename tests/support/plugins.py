"""Packages that add to this one's registries, as a user would write and install them."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path


def install_wheel(folder: Path, name: str, code: str, entry_points: Mapping[str, str]) -> Path:
    """Builds a wheel with one module and has pip install it.

    Args:
      folder: to work in.
      name: of the package and its module.
      code: of the module.
      entry_points: group -> ``name = module:Class``.

    Returns:
      the folder to add to ``sys.path``.
    """
    points = "".join(f"[{group}]\n{line}\n" for group, line in entry_points.items())
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": points,
    }
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        record = ""
        for path, text in files.items():
            file.writestr(path, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{path},sha256={digest},{len(text.encode())}\n"
        file.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    site = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True, timeout=300)
    return site
