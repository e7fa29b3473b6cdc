"""The pages: their shell blocks, as typed into a fresh clone; their links; the README's size and verdict."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from coup_lib.evaluation.config import Config
from coup_lib.reporting import readme

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {page.relative_to(ROOT): page.read_text() for page in readme.pages()}
PAGES |= {Path(name): (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
BLOCKS = [
    pytest.param(lines, id=f"{page.stem}: {lines.split('#')[0].splitlines()[0][:40]}")
    for page, text in PAGES.items()
    for lines in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
]

# What takes long is only looked at: that its files, folders and options are there.
PAPERMILL = """
import json, re, sys, yaml
from pathlib import Path

source, output, *options = sys.argv[1:]
(cell,) = [cell for cell in json.loads(Path(source).read_text())["cells"]
           if "parameters" in cell["metadata"].get("tags", [])]
known = re.findall(r"^(\\w+):", "".join(cell["source"]), re.MULTILINE)
given = {}
while options:
    flag = options.pop(0)
    if flag == "-y":
        given |= yaml.safe_load(options.pop(0))
    elif flag == "-p":
        given |= {options.pop(0): yaml.safe_load(options.pop(0))}
    else:
        sys.exit(f"papermill: unknown option {flag}")
if unknown := set(given) - set(known):
    sys.exit(f"{source}: unknown parameters {unknown}")
written = {"input_path": source, "parameters": given, "exception": None, "end_time": "now"}
Path(output).write_text(json.dumps({"metadata": {"papermill": written}}))
with open("calls", "a") as calls:
    calls.write(json.dumps(given) + "\\n")
"""
TRAIN = """
import sys
from pathlib import Path

words, code = sys.argv[2:], Path("training/train.py").read_text()
for word, value in zip(words, [*words[1:], ""]):
    if word.startswith("-") and f'"{word}"' not in code:
        sys.exit(f"coup train: unknown option {word}")
    if word == "--begin-with" and not Path(value).stat().st_size:
        sys.exit(f"{value}: is empty")
"""
AUDIT = """
import sys
from coup_lib.cli import audit_parser

audit_parser().parse_args(sys.argv[2:])
"""
PIP = """
import re, sys
from pathlib import Path

for extra in ",".join(re.findall(r"\\[(.*?)\\]", " ".join(sys.argv))).split(","):
    if extra and f"{extra} = [" not in Path("pyproject.toml").read_text():
        sys.exit(f"pip: no extra {extra}")
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with what git has at the top of this one, and nothing else."""
    folder = tmp_path / "clone"
    folder.mkdir()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in {line.split("/")[0] for line in tracked.splitlines()}:
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def typed(clone, tmp_path):
    """Runs lines in the clone; what the commands complain of, those in the background included."""
    snakemake = importlib.util.find_spec("snakemake")  # the extra `scale` wants Python 3.11
    stand_ins = {
        "papermill": f'"{sys.executable}" -c "$PAPERMILL" "$@"',
        "pip": f'"{sys.executable}" -c "$PIP" "$@"',
        "make": f'{shutil.which("make")} --dry-run "$@"',
        "snakemake": f'"{sys.executable}" -m snakemake --dry-run "$@"' if snakemake else "true",
        "python": 'case "$*" in *publishing* | *cifar10_small*) set -- "$@" --help;; esac\n'
        f'"{sys.executable}" "$@"',
        "coup": f'case "$1" in train) "{sys.executable}" -c "$TRAIN" "$@";;\n'
        f'audit) "{sys.executable}" -c "$AUDIT" "$@";;\n'
        f'*) "{sys.executable}" -m coup_lib.cli "$@";; esac',
    }
    for name, line in stand_ins.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/bin/bash\n{line} || {{ echo "{name} $*" >> "{tmp_path}/failed"; exit 1; }}\n')
        file.chmod(0o755)
    git = subprocess.run(["git", "rev-parse", "--absolute-git-dir"], cwd=ROOT, capture_output=True, text=True)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "GIT_DIR": git.stdout.strip(),
        "COUP_MODELS": str(tmp_path),
        "COUP_DATA": str(tmp_path),
        "REPOSITORY": f"file://{ROOT}",
        **{"PAPERMILL": PAPERMILL, "TRAIN": TRAIN, "AUDIT": AUDIT, "PIP": PIP},
    }

    def run(lines):
        command = ["bash", "-euo", "pipefail", "-c", lines]
        run = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=600)
        failed = tmp_path / "failed"
        return run.returncode, (failed.read_text() if failed.exists() else "") + run.stderr * run.returncode

    return run


@pytest.mark.parametrize("lines", BLOCKS)
def test_a_shell_block_runs_in_a_fresh_clone(typed, clone, lines):
    for commit in re.findall(r"git show (\w+):", lines):
        if subprocess.run(["git", "cat-file", "-e", commit], cwd=ROOT, capture_output=True).returncode:
            pytest.skip(f"a shallow clone, without {commit}")
    assert typed(lines) == (0, "")
    calls = (clone / "calls").read_text().splitlines() if (clone / "calls").exists() else []
    assert len(calls) >= lines.count("papermill notebooks/")
    for given in map(json.loads, calls):  # values that would be refused
        Config(**{field.name: given[field.name] for field in fields(Config) if field.name in given})


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("papermill notebooks/04_autoattack.ipynb nowhere/out.ipynb & wait", "nowhere/out.ipynb"),
        ("papermill notebooks/4_autoattack.ipynb out.ipynb", "4_autoattack.ipynb"),
        ("papermill notebooks/04_autoattack.ipynb out.ipynb -p normm l2", "normm"),
        ('pip install -e ".[cifer]"', "cifer"),
        ("coup train --step 3", "--step"),
        ("coup audit defences:build --data digits --radius 3", "--radius"),
        ("coup fetsh", "fetsh"),
        ("make reproduced", "reproduced"),
    ],
)
def test_a_mistake_in_one_would_be_seen(typed, line, complaint):
    assert complaint in typed(line)[1]


def test_the_readme_is_a_page_and_not_a_book():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1800


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        file, _, heading = target.partition("#")
        there = (ROOT / page.parent / file).resolve() if file else ROOT / page
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


ADDRESS = re.compile(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[\w./~%+=&?#@:-]*)?")
KNOWN = {  # what an address at these hosts has to look like
    "arxiv.org": r"/(abs|pdf)/\d{4}\.\d{4,5}(v\d+)?",
    "doi.org": r"/10\.\d{4,9}/\S+",
    "github.com": r"/[\w.-]+/[\w.-]+(/.*)?",
}
MORE = [*map(Path, ("CITATION.cff", "workflow/cost.md"))]
MORE += [path.relative_to(ROOT) for path in ROOT.glob("coup_lib/weights/*/README.md")]
WRITTEN = PAGES | {path: (ROOT / path).read_text() for path in MORE}


@pytest.mark.parametrize("page", WRITTEN, ids=str)
def test_every_address_is_well_formed(page):
    """Whether it answers, `make docs BUILDER=linkcheck` asks, where there is a network."""
    for address in re.findall(r"https?:[^\s)>\]\"'`]+", WRITTEN[page]):
        address = address.rstrip(".,;")
        assert ADDRESS.fullmatch(address), address
        host, _, rest = address.removeprefix("https://").partition("/")
        assert re.fullmatch(KNOWN.get(host, ".*"), f"/{rest}"), address


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_image_of_a_page_says_what_it_shows(page):
    assert all(len(alt) > 20 for alt in re.findall(r"!\[(.*?)\]", PAGES[page]))


def test_every_number_of_the_verdict_stands_in_a_committed_table():
    """The sentences are written by hand, so a table that is published anew can leave them behind."""
    verdict = README.split("## Verdict\n")[1].split("<!-- claims -->")[0]
    claims = "".join((ROOT / f"{name}.md").read_text() for name in VERDICT)
    shown = re.sub(r"\]\(.*?\)", "]", verdict)  # without the addresses of links
    numbers = re.findall(r"[+-]?\d+\.\d\d?", shown)
    assert len(numbers) >= 15
    for number in numbers:
        assert re.search(rf"(?<![\d.])[+-]?{re.escape(number.lstrip('+-'))}(?!\d)", claims), number
        if number[0] in "+-":
            assert number in claims, number


VERDICT = (
    "figures/digits/table1_claims",
    "figures/digits/table1_all_attacks",
    "figures/digits/table1_counts_claims",
    "figures/digits/table3_linf_claims",
    "figures/digits/beyond_linf_verdict",
    "figures/digits/beyond_l2_verdict",
    "figures/side_by_side",
    "figures/cifar10-small/fig2b_linf_resnet20",
    "figures/cifar10-small/fig2b_linf_resnet20_claims",
    "figures/cifar10-small/fig2b_linf_resnet20_counts_claims",
    "figures/cifar10-small/fig2b_l2_resnet20_claims",
    "docs/literature",
)
