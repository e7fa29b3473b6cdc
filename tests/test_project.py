"""What would rot unseen: the two dependency lists, the pages' numbers, what importing brings along."""

import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from closed_forms import small_problem

from coup_lib import coup, load_classifier, load_score
from coup_lib.data import load_split
from coup_lib.evaluation import records
from coup_lib.purify import standard_normal
from coup_lib.reporting import plots, readme

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]


def test_environment_yml_has_the_dependencies_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line.strip() for line in (ROOT / "environment.yml").read_text().splitlines()]
    pip_list = [line.removeprefix("- ") for line in lines[lines.index("- pip:") + 1 :]]
    assert pip_list == [*project["dependencies"], "-e .[cifar]"]
    assert f"- python{project['requires-python']}" in lines


def test_the_library_does_not_import_robustbench_or_torchvision():
    code = (
        "import sys, pkgutil, importlib, coup_lib\n"
        "for module in pkgutil.iter_modules(coup_lib.__path__):\n"
        "    importlib.import_module(f'coup_lib.{module.name}')\n"
        "assert not {'robustbench', 'torchvision'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_results_and_figures_are_few_small_files_without_attacked_images():
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = found.splitlines()
    assert len(files) <= 600
    results = [name for name in files if name.startswith("results/")]
    assert results and not [
        name for name in results if name.endswith(".json") or f"/{records.APART}/" in name
    ]
    for name in results:
        if name.endswith(".npz"):
            with np.load(ROOT / name) as file:
                assert "x_adv" not in file.files, name
    large = [path.name for path in ROOT.glob("figures/*/*.png") if path.stat().st_size > plots.MOST_BYTES]
    assert not large


@pytest.mark.parametrize("page", readme.pages(), ids=lambda page: page.name)
def test_a_page_is_in_step_with_the_committed_tables(page):
    regenerated = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "figures", "notebooks"], cwd=ROOT)
    if regenerated.returncode:
        pytest.skip("figures or notebooks were regenerated here; the pages quote the committed ones")
    text = page.read_text()
    assert readme.filled(text) == text, "run `make readme`"


def blocks():
    """Every block of Python in the README and the pages of docs/, but for the recipes."""
    return {
        code
        for page in readme.pages()
        if page.name != "recipes.md"
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    }


def block(word):
    """The one block of Python with this word."""
    (found,) = [code for code in blocks() if word in code]
    return found


def test_every_block_of_python_is_run_by_a_test():
    """By those below, which find it by a word that only one of them has."""
    words = ("def purify", "your attack here", "my_defence}, x, y", "my_noise_network")
    assert {block(word) for word in words} == blocks()


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("networks", ["closed forms", "digits"])
def test_the_plain_algorithm_is_coup(networks, weight):
    names = {}
    exec(block("def purify"), names)
    score, classifier, x = small_problem()
    if networks == "digits":
        x = load_split("digits", "test").first(3).x.double()
        score, classifier = load_score("digits", "score").double(), load_classifier("digits", "cnn-small")
        classifier = classifier.double()
    seeds = torch.arange(len(x))
    defence = coup(classifier, score, weight, t_star=0.2, n_steps=8)
    noise = standard_normal(seeds, 9, x)[1:]  # the first is DiffPure's forward noise
    purified = names["purify"](x, score, classifier, noise, t_star=0.2, weight=weight)
    torch.testing.assert_close(purified, defence.purifier(x, seeds), rtol=0, atol=1e-10)
    torch.testing.assert_close(classifier(purified), defence(x, seeds), rtol=0, atol=1e-9)
    assert (purified - x).abs().max() > 0.01


@pytest.mark.parametrize("page", ["README.md", "docs/method.md"])
def test_what_a_page_places_in_the_code_is_there(page):
    """Its map of the paper: every `file`: `name`, `name` is defined in that file."""
    found = re.findall(r"`(coup_lib/[\w/]+\.py)`: (`[\w.]+`(?:, `[\w.]+`)*)", (ROOT / page).read_text())
    assert len(found) >= 10
    for file, names in found:
        code = (ROOT / file).read_text()
        for part in re.findall(r"\w+", names):
            assert re.search(rf"^ *(?:def|class) {part}\b", code, re.MULTILINE), (file, part)


def test_the_readmes_attack_runs_and_breaks_images(capsys):
    exec(block("your attack here"), {})
    robust = float(re.search(r"tensor\((.*)\)", capsys.readouterr().out)[1])
    assert robust < 0.95


def test_the_readmes_audit_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = load_split("digits", "test").first(4)
    defence = load_classifier("digits", "cnn-small")
    exec(block("my_defence}, x, y"), {"my_defence": defence, "x": images.x, "y": images.y})
    out = capsys.readouterr().out
    page = tmp_path / "build" / "audit" / "audit.html"
    assert "**mine**: robust accuracy at most" in out and out.endswith(f"see {page}\n") and page.is_file()


def test_the_lines_for_own_networks_run():
    """Of docs/own-networks.md, a user's networks as `my_...`: ε and variances, logits of colour images."""

    class Noise(torch.nn.Module):
        def forward(self, x, labels):
            seen.append(labels)
            return types.SimpleNamespace(sample=0.1 * torch.cat([x, x], dim=1))  # as diffusers returns it

    seen: list[torch.Tensor] = []
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 5))
    names = {"my_noise_network": Noise(), "my_classifier": network}
    exec(block("my_noise_network"), names)
    x = torch.rand(2, 3, 4, 4).requires_grad_()
    logits = names["defence"](x)
    assert logits.shape == (2, 5)
    assert torch.autograd.grad(logits.sum(), x)[0].abs().sum() > 0
    steps = torch.cat(seen)  # 1000 t - 1, from t* = 0.1 to the first step
    assert (float(steps.min()), float(steps.max())) == pytest.approx((0, 99))
