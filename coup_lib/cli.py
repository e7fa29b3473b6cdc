"""The command `coup`: audit defences, fetch published networks, estimate what notebooks cost, train networks.

What a sub-command needs is imported when it runs, so that `coup --help` answers at once.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import resolve_name
from textwrap import shorten
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn
from zipfile import BadZipFile, is_zipfile
from zlib import error as ZlibError

from coup_lib import paths

if TYPE_CHECKING:
    import torch

AUDIT = """\
Put defences through every attack of the protocol, and everything made against one on all the others. Prints
their accuracies, verdicts and warnings, and writes a page with all of it.

What is finished is on record in the folder: run again after a kill, or in several processes at once, an
audit goes on from there."""
AUDITED = """\
examples:
  coup audit defences:build --data images.npz --norm linf --eps 8/255
  coup audit mine=defences:build theirs=../theirs/model.py:network --data digits --n 64 --eps 0.15"""


# Name → what runs it, and what it does.
COMMANDS = {
    "audit": ("coup_lib.cli:run_audit", "how robust defences are, by the whole strict protocol"),
    "fetch": ("coup_lib.networks.published:main", "the published networks: what is here, and fetching them"),
    "estimate": ("workflow.estimate:main", "what notebooks will cost on this machine (in a checkout)"),
    "train": ("training.train:main", "train the networks of the small profiles (in a checkout)"),
}


class OneLine(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage; exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: its first word is a sub-command, which is given the others.

    SystemExit where one needs a checkout and there is none.
    """
    words = sys.argv[1:] if arguments is None else arguments
    parser = OneLine(
        prog="coup",
        description="How robust a defence is, and what the notebooks of COUP need.",
        epilog="COMMAND --help lists its options. Example: coup audit defences:build --data digits --eps 0.1",
    )
    listed = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, what) in COMMANDS.items():
        listed.add_parser(name, help=what, add_help=False)
    run, _ = COMMANDS[parser.parse_args(words[:1]).command]
    if not run.startswith("coup_lib"):  # it lies beside the package, and is not installed with it
        if not (file := paths.ROOT / f"{run.partition(':')[0].replace('.', '/')}.py").is_file():
            raise SystemExit(f"coup: this needs a checkout of the repository, run in it; there is no {file}")
        sys.path.insert(0, str(paths.ROOT))
    resolve_name(run)(words[1:])


# --- coup audit ---


def run_audit(arguments: Sequence[str]) -> None:
    """Audit the defences that are named, print what was found and save the page."""
    from coup_lib.auditing.audit import audit
    from coup_lib.checks import number
    from coup_lib.evaluation.config import device

    parser = audit_parser()
    options = parser.parse_args(arguments)
    try:
        eps = number("--eps", options.eps, 0)
        place = device(options.device) if options.device else None
        x, y = read_images(options.data, options.n)
        defences = read_defences(options.targets, place)
        found = audit(
            defences,
            x,
            y,
            norm=options.norm,
            eps=eps,
            budget=options.budget,
            folder=options.folder,
            seed=options.seed,
            max_batch=options.max_batch,
            outside=options.outside,
        )
    except (ValueError, FloatingPointError, FileNotFoundError) as error:
        parser.error(str(error))
    said = [text.replace("**", "") for text in (*map(found.verdict, found.worst), *found.claims)]
    print("", found.table().to_string(), "", *said, sep="\n")
    print(*(f"Warning: {text}" for text in found.warnings), f"\n{found.save()}", sep="\n")


def audit_parser() -> argparse.ArgumentParser:
    """The options of `coup audit`."""
    from coup_lib.attacks import NORMS
    from coup_lib.data import SIZES
    from coup_lib.evaluation.profiles import BUDGETS

    parser = OneLine(
        prog="coup audit",
        description=AUDIT,
        epilog=AUDITED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="[NAME=]MODULE:ATTRIBUTE or [NAME=]PATH.py:ATTRIBUTE; a module may lie in the current folder. "
        "The attribute is a defence, a dict of several by name, or a callable without arguments that "
        "returns either. A defence is a torch.nn.Module from images in [0, 1] to logits, a pair (purifier, "
        "classifier) of modules, or a coup_lib.Defence. NAME is what the tables call it (default: "
        "MODULE.ATTRIBUTE, or the dict's own names)",
    )
    option(
        "--data",
        required=True,
        metavar="IMAGES",
        help="an .npz file with x (n, ...), floating point in [0, 1], and y (n,), whole numbers; or the test "
        f"images of {', '.join(SIZES)} (required)",
    )
    option("--n", type=int, help="only the first N of these images (default: all)")
    option("--norm", type=str.lower, choices=NORMS, default="linf", help="of the ball (default: %(default)s)")
    option("--eps", required=True, help='radius in units of x, a number or as "8/255" (required)')
    option(
        "--budget",
        choices=BUDGETS,
        default="quick",
        help="quick: 20 iterations and 5 draws a gradient; full: the paper's 100 and 20; smoke: to see that "
        "it runs (default: %(default)s)",
    )
    option(
        "--folder",
        default="build/audit",
        help="of the records and of audit.html, .md, .csv and .png (default: %(default)s)",
    )
    option("--seed", type=int, default=0, help="of attacks and draws (default: %(default)s)")
    option(
        "--max-batch",
        type=int,
        default=640,
        metavar="N",
        help="the most images in one call; halved as long as memory runs out (default: %(default)s)",
    )
    option("--outside", action="store_true", help="also attack outside the ball: filters and flows")
    option("--device", help="cpu, cuda, ...: where the defences are moved to (default: they stay)")
    return parser


def read_images(given: str, n: int | None = None) -> "tuple[torch.Tensor, torch.Tensor]":
    """The first n images x (n, ...) in [0, 1] and labels y (n,) of an .npz file or of a test split.

    Raises:
        ValueError: naming what was expected and what came.
        FileNotFoundError: for a data set that is not here and cannot be fetched.
    """
    import numpy as np

    from coup_lib.auditing.defence import check_data
    from coup_lib.checks import count
    from coup_lib.data import SIZES, load_split

    if given in SIZES:
        images = load_split(given, "test")
        x, y = images.x, images.y
    else:
        expected = f"--data: expected an .npz file with x and y, or one of {', '.join(SIZES)}"
        if not Path(given).is_file():
            raise ValueError(f"{expected}; there is no file {given}")
        if not is_zipfile(given):
            raise ValueError(f"{expected}; {given} is no .npz file, or is cut short")
        try:
            with np.load(given, allow_pickle=False) as arrays:
                if not {"x", "y"} <= set(arrays.files):
                    raise ValueError(f"got {', '.join(arrays.files) or 'nothing'}")
                x, y = check_data(arrays["x"], arrays["y"])
        except (ValueError, TypeError, OSError, EOFError, BadZipFile, ZlibError) as error:
            raise ValueError(f"{expected}; {given}: {error}") from None
    n = len(x) if n is None else count("--n", n, len(x), low=2)
    return x[:n], y[:n]


def read_defences(targets: Sequence[str], device: "torch.device | None" = None) -> dict[str, Any]:
    """Name → defence of all that the targets of the command line stand for, on the device if one is given.

    Raises:
        ValueError: naming what was expected and what came.
        RuntimeError: caused by whatever a target's own code raised.
    """
    from coup_lib.auditing.defence import Defence, as_module

    sys.path.insert(0, str(Path.cwd()))
    defences: dict[str, Any] = {}
    for target in targets:
        for name, one in defences_at(target).items():
            if name in defences:
                raise ValueError(f"{target}: expected a name of its own, NAME={target}; got {name} twice")
            for part in (one.model, *one.gradients.values()) if isinstance(one, Defence) else (one,):
                module = as_module(name, part)
                if device:
                    module.to(device)
            defences[name] = one
    return defences


def defences_at(target: str) -> dict[str, Any]:
    """Name → defence of what one target stands for; raises what `read_defences` raises."""
    from torch import nn

    name, _, where = target.rpartition("=")
    place, _, attribute = where.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"{target}: expected [NAME=]MODULE:ATTRIBUTE or [NAME=]PATH.py:ATTRIBUTE")
    module = imported(place)
    if not hasattr(module, attribute):
        others = shorten(", ".join(one for one in vars(module) if one[0] != "_") or "nothing", 200)
        raise ValueError(f"{target}: expected {attribute} in {place}, which has {others}")
    found = getattr(module, attribute)
    if callable(found) and not isinstance(found, nn.Module):
        found = made_by(found, target)
    if isinstance(found, Mapping):
        return {f"{name} {key}".strip(): one for key, one in found.items()}
    return {name or f"{Path(place).name.removesuffix('.py')}.{attribute}": found}


def imported(place: str) -> ModuleType:
    """A module by its name or its file; raises what `read_defences` raises."""
    file = Path(place)
    is_file = file.suffix == ".py" or file.name != place or place[0] == "."
    if is_file and not (file.suffix == ".py" and file.is_file()):
        raise ValueError(f"{place}: expected a file of Python; there is none")
    try:
        if not is_file:
            return import_module(place)
        sys.path.insert(0, str(file.resolve().parent))  # for the modules beside it
        spec = spec_from_file_location(place, file)
        assert spec and spec.loader
        sys.modules[place] = module = module_from_spec(spec)  # where its classes' source is looked for
        spec.loader.exec_module(module)
        return module
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"{place}: expected a module that can be imported from here; {error}") from None
    except Exception as error:
        raise RuntimeError(f"{place}: its own code failed") from error


def made_by(make: Callable[..., Any], target: str) -> Any:
    """What a target's callable returns; raises what `read_defences` raises."""
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        expected = "a defence, or a callable without arguments that returns one"
        raise ValueError(f"{target}: expected {expected}; {error}") from None
    try:
        return make()
    except Exception as error:
        raise RuntimeError(f"{target}: its own code failed") from error


if __name__ == "__main__":
    main()
