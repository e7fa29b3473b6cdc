"""The recipes of docs/recipes.md run as they stand there, each where the library it is about is installed."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
RECIPES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))


def libraries(code):
    """The packages that some code imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from (name.partition(".")[0] for name in named)


def test_every_recipe_is_found_and_short():
    assert len(RECIPES) == PAGE.count("```python") == 7
    for title, code in RECIPES.items():
        assert len([line for line in code.splitlines() if line]) <= 15, title


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_runs(title, tmp_path, monkeypatch):
    for name in libraries(RECIPES[title]):
        if not find_spec(name):
            pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)  # its build/ lies there
    torch.manual_seed(0)
    names = {}
    exec(RECIPES[title], names)
    if "found" in names:
        table = names["found"].table()
        assert list(table.index) == list(names["found"].worst) and (table["n"] == names["n_images"]).all()
        assert len([*tmp_path.glob("build/audit/*/audit.html")]) == 1
    else:
        distance = (names["attacked"] - names["images"].x).abs().amax()
        assert 0 < distance <= 0.15 + 1e-6
        assert names["right"].shape == (names["n_images"], names["draws"])
        assert 0 <= names["robust"] <= 1
