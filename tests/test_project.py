"""What would rot unseen: the two dependency lists, the README's numbers, what importing brings along."""

import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]


def test_environment_yml_has_the_dependencies_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line.strip() for line in (ROOT / "environment.yml").read_text().splitlines()]
    pip_list = [line.removeprefix("- ") for line in lines[lines.index("- pip:") + 1 :]]
    assert pip_list == [*project["dependencies"], "-e ."]
    assert f"- python{project['requires-python']}" in lines


def test_the_library_does_not_import_robustbench_or_torchvision():
    code = (
        "import sys, pkgutil, importlib, coup_lib\n"
        "for module in pkgutil.iter_modules(coup_lib.__path__):\n"
        "    importlib.import_module(f'coup_lib.{module.name}')\n"
        "assert not {'robustbench', 'torchvision'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_readme_is_in_step_with_the_records():
    from coup_lib import readme

    text = (ROOT / "README.md").read_text()
    assert readme.filled(text) == text, "run `make readme`"
