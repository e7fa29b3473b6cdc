"""RobustBench is imported only when asked for, and its broken import is mended."""

import importlib.util
import subprocess
import sys

import pytest

INSTALLED = importlib.util.find_spec("robustbench") is not None


@pytest.mark.skipif(INSTALLED, reason="robustbench is installed")
def test_without_the_extra_the_message_says_how_to_get_it():
    from coup_lib.zoo import robustbench_model

    with pytest.raises(ImportError, match=r"pip install 'coup-lib\[robustbench\]'"):
        robustbench_model("Standard")


@pytest.mark.skipif(not INSTALLED, reason="robustbench is not installed (an extra)")
def test_a_file_put_by_hand_is_loaded_offline(tmp_path):
    """RobustBench's own architecture with random weights, saved where its loader looks first."""
    code = f"""
import torch
from coup_lib.zoo import _mend_autoattack, robustbench_model
_mend_autoattack()
from robustbench.model_zoo.architectures.wide_resnet import WideResNet
from pathlib import Path
path = Path({str(tmp_path)!r}) / "cifar10" / "Linf" / "Standard.pt"
path.parent.mkdir(parents=True)
torch.save({{"state_dict": WideResNet(depth=28, widen_factor=10).state_dict()}}, path)
model = robustbench_model("Standard", model_dir={str(tmp_path)!r}, threat_model="Linf")
assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
assert not model.training and not any(p.requires_grad for p in model.parameters())
"""
    subprocess.run([sys.executable, "-c", code], check=True)
