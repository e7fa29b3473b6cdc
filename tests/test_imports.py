"""What loading the library takes."""

import subprocess
import sys

import coup_lib

HEAVY = ("sklearn", "scipy", "pandas", "torchsde", "matplotlib", "robustbench", "autoattack", "pyautoattack")


def test_the_method_loads_nothing_heavy_but_torch():
    program = "import sys, coup_lib.purify; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded and not loaded & set(HEAVY)


def test_what_a_user_imports_comes_from_the_package_itself():
    for name in coup_lib.__all__:
        assert getattr(coup_lib, name).__module__.startswith("coup_lib.")
    assert {"coup", "diffpure", "reverse_only", "Attack", "load_score"} <= set(coup_lib.__all__)
