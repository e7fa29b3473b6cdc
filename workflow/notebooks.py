"""The notebooks in two processes at a time, and the report after all of them.

    python -m workflow.notebooks BUDGET [RUN ...]      NAME@l2 is notebook NAME in that norm

Their kernels are forked from one process that has imported what notebooks import, which takes longer than to
read most of them back from records.
"""

import argparse
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

ROOT = Path(__file__).parents[1]
# A notebook that wants a record that another one is making waits for it: those that make most come first.
RUNS = (
    "04_autoattack",
    "04_autoattack@l2",
    "07_stronger_attacks",
    "08_beyond",
    "03_sweeps",
    "02_ablation",
    "06_adversarial_training",
    "05_bpda",
    "00_toy_analysis",
    "01_case_study",
    "10_your_defence",
    "11_playground",
)
ONLY_FULL = ("08_beyond@l2",)  # its tables are committed, but no quick run is to wait for it
REPORT = "09_report"  # wants nearly all records
# The toy analysis knows one size; an audit and the playground are no experiments of the paper: always quick.
OF_ONE_SIZE = ("00", "10", "11")
IMPORTED = (
    "ipykernel.zmqshell",
    "matplotlib.pyplot",
    "matplotlib_inline.backend_inline",
    "sklearn.datasets",
    "sklearn.model_selection",
    "coup_lib.auditing.audit",
    "coup_lib.studies.report",
    "coup_lib.studies.playground",
)
SHOWN = (" gone", "done in", "Error", "override")  # of a notebook's output: progress, and what went wrong
FORKED = multiprocessing.get_context("forkserver")


class Kernel:
    """A kernel's process, with as much of `subprocess.Popen` as Jupyter asks for."""

    stdin = stdout = stderr = None

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: str) -> None:
        self.process = FORKED.Process(target=start, args=(arguments, environment, folder))
        self.process.start()
        self.pid = self.process.pid or 0
        self.kill, self.terminate = self.process.kill, self.process.terminate

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        return self.process.exitcode

    def wait(self) -> int | None:
        """The exit code."""
        self.process.join()
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Signal the process."""
        os.kill(self.pid, number)


class Forking(LocalProvisioner):
    """Gives Jupyter kernels that are forked."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start the kernel of a command that ends in its arguments; returns how to reach it."""
        kernel = Kernel(cmd[cmd.index("-f") :], kwargs["env"], kwargs.get("cwd") or os.getcwd())
        self.process, self.pid = kernel, kernel.pid  # type: ignore[assignment]
        return self.connection_info


def fork_kernels() -> None:
    """From now on kernels that this process starts are forked."""
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # else chosen before the fork
    FORKED.set_forkserver_preload([*IMPORTED])
    factory = KernelProvisionerFactory.instance(default_provisioner_name="forking")
    factory.provisioners["forking"] = EntryPoint("forking", "workflow.notebooks:Forking", factory.GROUP_NAME)


def start(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Be a kernel, which ends when the runner does."""
    from ipykernel.kernelapp import IPKernelApp

    threading.Thread(target=end_with_runner, daemon=True).start()
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    IPKernelApp.launch_instance(arguments, parent_handle=os.getppid(), log_level=logging.ERROR)


def end_with_runner() -> None:
    """End this process when the one that asked for it, not the one it was forked from, has ended."""
    runner = multiprocessing.parent_process()
    assert runner
    runner.join()
    os._exit(1)


class Shown(logging.Handler):
    """Prints what is `SHOWN` of a notebook's output, behind its name: that of the thread it runs in."""

    def emit(self, record: logging.LogRecord) -> None:
        for line in record.getMessage().splitlines():
            if any(word in line for word in SHOWN):
                print(f"{threading.current_thread().name}: {line}", flush=True)


def execute(run: str, budget: str, folder: Path) -> None:
    """Execute one notebook into the folder; raises papermill's error where one of its cells fails."""
    import papermill

    name, _, norm = run.partition("@")
    given = {"norm": norm} if norm else {}
    if budget != "quick" and name[:2] not in OF_ONE_SIZE:
        given["budget"] = budget
    threading.current_thread().name = run
    print(f"{run}: started", flush=True)
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        folder / f"{run.replace('@', '_')}.ipynb",
        given,
        log_output=True,
        progress_bar=False,
    )
    print(f"{run}: done", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exit code 1, and nothing more is begun, when a notebook fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("budget", choices=("smoke", "quick", "full"))
    parser.add_argument("runs", nargs="*", metavar="RUN", help="default: every notebook")
    options = parser.parse_args(arguments)
    folder = ROOT / "build" / f"notebooks-{options.budget}"
    folder.mkdir(parents=True, exist_ok=True)
    fork_kernels()
    logger = logging.getLogger("papermill")
    logger.setLevel(logging.INFO)
    logger.addHandler(Shown())
    pool = ThreadPoolExecutor(2)
    try:
        every = (*RUNS, *ONLY_FULL) if options.budget == "full" else RUNS
        jobs = [pool.submit(execute, run, options.budget, folder) for run in options.runs or every]
        for job in jobs:
            job.result()
        if not options.runs:
            execute(REPORT, options.budget, folder)
    except KeyboardInterrupt:
        os._exit(130)  # rather than wait for the notebooks; their kernels end with this process
    except Exception as error:
        pool.shutdown(cancel_futures=True)
        sys.exit(str(error))


if __name__ == "__main__":
    main()
