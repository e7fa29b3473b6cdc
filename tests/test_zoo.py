"""Networks by name: published files through their loaders, small stand-ins in a smoke run, RobustBench."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_edm import fresh, weights

from coup_lib.networks import zoo
from coup_lib.networks.checkpoints import CheckpointError
from coup_lib.networks.ddpmpp import DDPMpp
from coup_lib.networks.edm import Denoiser, load_edm
from coup_lib.networks.wideresnet import WideResNet
from coup_lib.score import DenoisedScore, NoiseScore

INSTALLED = importlib.util.find_spec("robustbench") is not None
SMALL = partial(DDPMpp, width=16, blocks=1)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty model folder, outside of a smoke run."""
    monkeypatch.setenv("COUP_MODELS", str(tmp_path))
    monkeypatch.setattr(zoo, "is_smoke", lambda: False)
    return tmp_path


def put(folder, place, content):
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / place)


def sized(monkeypatch, known, dataset, name, build):
    """The published network at a size for tests; its file, loader and names stay."""
    monkeypatch.setitem(known[dataset], name, replace(known[dataset][name], build=build))


def test_the_papers_score_is_made_of_the_averages_in_its_checkpoint(models, monkeypatch):
    sized(monkeypatch, zoo.SCORES, "cifar10", "ddpmpp-deep", SMALL)
    torch.manual_seed(0)
    trained = SMALL().eval()
    averages = [parameter.detach() for parameter in trained.parameters()]
    raw = {f"module.{key}": torch.full_like(value, torch.nan) for key, value in trained.state_dict().items()}
    ema = {"decay": 0.9999, "num_updates": 7, "shadow_params": averages}
    put(models, "cifar10/score/checkpoint_8.pth", {"optimizer": {}, "model": raw, "ema": ema, "step": 7})
    score, x, t = zoo.load_score("cifar10", "ddpmpp-deep"), torch.randn(2, 3, 32, 32), torch.tensor(0.1)
    expected = NoiseScore(trained, time_scale=999.0)(x, t)
    assert torch.equal(score(x, t), expected) and expected.abs().max() > 0
    assert not score.training and not any(parameter.requires_grad for parameter in score.parameters())
    # The SHA-256 of its first use holds.
    averages[0] += 1
    put(models, "cifar10/score/checkpoint_8.pth", {"model": raw, "ema": ema})
    with pytest.raises(CheckpointError, match=r"expected [0-9a-f]{64} as at its first use"):
        zoo.load_score("cifar10", "ddpmpp-deep")


def test_edms_denoiser_becomes_a_score(models, monkeypatch):
    sized(monkeypatch, zoo.SCORES, "cifar100", "edm-vp", fresh)
    trained = load_edm(fresh(), weights())
    put(models, "cifar100/score/edm_cifar100_uncond_vp.pt", weights())
    score, x, t = zoo.load_score("cifar100", "edm-vp"), torch.randn(2, 3, 32, 32), torch.tensor(0.1)
    assert isinstance(score, DenoisedScore) and isinstance(score.denoiser, Denoiser)
    assert torch.equal(score(x, t), DenoisedScore(trained)(x, t))


@pytest.mark.parametrize(
    ("dataset", "name", "place", "wrap"),
    [
        ("cifar10", "wrn-70-16-dropout", "cifar10/classifier/wrn-70-16-dropout.pt", lambda state: state),
        ("cifar100", "wrn-40-2", "cifar100/classifier/wrn_40_2.pth", lambda state: {"model": state}),
    ],
)
def test_classifiers_lose_the_prefixes_of_their_files(models, monkeypatch, dataset, name, place, wrap):
    classes = int(dataset.removeprefix("cifar"))
    build = partial(WideResNet, depth=10, widen=1, classes=classes, statistics=([0.5] * 3, [0.2] * 3))
    sized(monkeypatch, zoo.CLASSIFIERS, dataset, name, build)
    torch.manual_seed(0)
    trained, x = build().eval(), torch.rand(2, 3, 32, 32)
    put(models, place, wrap({f"module.{key}": value for key, value in trained.state_dict().items()}))
    assert torch.equal(zoo.load_classifier(dataset, name)(x), trained(x))


def test_the_wheels_resnet18_needs_no_file(models):
    logits = zoo.load_classifier("cifar10", "resnet18")(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 10) and not logits.requires_grad


def test_untrained_networks_are_of_full_size_and_need_no_file(models):
    sizes = {
        network: sum(parameter.numel() for parameter in network.parameters())
        for network in (
            zoo.load_classifier("cifar10", "Standard", trained=False),
            zoo.load_classifier("cifar100", "wrn-40-2", trained=False),
            zoo.load_score("cifar100", "edm-vp", trained=False),
        )
    }
    assert list(sizes.values()) == [36_479_194, 2_255_156, 55_732_739]
    assert not list(models.iterdir())


def test_missing_files_are_named_with_their_places(models):
    with pytest.raises(FileNotFoundError) as error:
        zoo.load_score("cifar100", "edm-vp")
    assert str(models / "cifar100/score/edm_cifar100_uncond_vp.pt") in str(error.value)


def test_what_a_profile_needs():
    names = zoo.needed("cifar10", ["Standard", "resnet18", "Wang2023Better_WRN-28-10@L2"], "ddpmpp-deep")
    assert names == []  # the tests are a smoke run
    assert zoo.needed("digits", ["cnn-small"], "score") == []
    assert zoo.missing("cifar10", ["wrn-70-16-dropout"], "ddpmpp-deep") == []


def test_listed_names(models):
    names = zoo.needed("cifar10", ["Standard", "resnet18", "Wang2023Better_WRN-28-10@L2"], "ddpmpp-deep")
    expected = ["cifar10/Linf/Standard", "resnet18", "cifar10/L2/Wang2023Better_WRN-28-10", "ddpmpp-deep"]
    assert names == expected
    # An undefended classifier wants no score network, and one in the wheel or in this repository no file.
    assert zoo.missing("cifar10", ["Standard", "resnet18", "Standard"]) == expected[:1]
    assert zoo.needed("cifar10", ["resnet20-linf"], "score-small") == []


def test_a_readable_file_of_another_network_is_refused_and_not_recorded(models, monkeypatch):
    """Put under the right name: its first use ends in an error; the right file is taken after it."""
    place = "cifar10/classifier/wrn-70-16-dropout.pt"
    build = partial(WideResNet, depth=10, widen=1, classes=10, statistics=([0.5] * 3, [0.2] * 3))
    sized(monkeypatch, zoo.CLASSIFIERS, "cifar10", "wrn-70-16-dropout", build)
    put(models, place, {"state_dict": SMALL().state_dict()})
    with pytest.raises(CheckpointError) as caught:
        zoo.load_classifier("cifar10", "wrn-70-16-dropout")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{models / place}: wrn-70-16-dropout does not fit WideResNet at ")
    assert "got nothing; and all_modules" in first and "expected nothing" in first
    assert any("from https://drive.google.com" in line for line in rest)
    assert not (models / "SHA256SUMS").exists()
    put(models, place, build().state_dict())
    zoo.load_classifier("cifar10", "wrn-70-16-dropout")
    assert place in (models / "SHA256SUMS").read_text()


@pytest.mark.parametrize("name", ["Standard", "Carmon2019Unlabeled"])
def test_what_robustbench_cannot_load_is_named_with_its_file(models, monkeypatch, name):
    def refuse(model, **settings):
        raise RuntimeError("Error(s) in loading state_dict for Net: Missing key(s): " + 1000 * '"a.weight", ')

    monkeypatch.setattr(zoo, "robustbench_loader", lambda: refuse)
    place = f"cifar10/Linf/{name}.pt"
    put(models, place, {"state_dict": {"b": torch.ones(1)}})
    with pytest.raises(CheckpointError, match=rf"{models / place}: .*Missing key.* \"a.weight\"") as caught:
        zoo.load_classifier("cifar10", name)
    assert len(str(caught.value)) < 2000 and not (models / "SHA256SUMS").exists()
    (models / place).write_text("<html>Quota exceeded</html>")
    with pytest.raises(CheckpointError, match=rf"{models / place}: this is a web page"):
        zoo.load_classifier("cifar10", name)


@pytest.mark.parametrize(
    ("dataset", "classifier", "score"),
    [("cifar10", "Standard", "ddpmpp-deep"), ("cifar100", "wrn-40-2", "edm-vp")],
)
def test_a_smoke_run_fetches_nothing(tmp_path, monkeypatch, dataset, classifier, score):
    monkeypatch.setenv("COUP_MODELS", str(tmp_path))
    x, classes = torch.rand(2, 3, 32, 32), int(dataset.removeprefix("cifar"))
    assert zoo.load_classifier(dataset, classifier)(x).shape == (2, classes)
    assert zoo.load_score(dataset, score)(x, torch.tensor(0.1)).shape == x.shape
    assert not list(tmp_path.iterdir())


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match=r"classifier: expected one of cnn-small, cnn-large, .*; got 'resnet18'"
    ):
        zoo.check_classifier("digits", "resnet18")
    with pytest.raises(ValueError, match=r"threat model .* expected one of Linf, L2; got 'L1'"):
        zoo.check_classifier("cifar10", "Standard@L1")
    assert zoo.check_classifier("cifar10", "Standard@L2") == "Standard@L2"


@pytest.mark.skipif(INSTALLED, reason="robustbench is installed")
def test_without_the_extra_the_message_says_how_to_get_it(models):
    with pytest.raises(ImportError, match=r"pip install 'coup-lib\[cifar\]'"):
        zoo.load_classifier("cifar10", "Carmon2019Unlabeled")


@pytest.mark.skipif(not INSTALLED, reason="robustbench is not installed (an extra)")
def test_a_file_put_by_hand_is_loaded_offline(tmp_path):
    """RobustBench's own architecture with random weights, saved where its loader looks first."""
    code = """
import torch
from coup_lib.networks.zoo import load_classifier, robustbench_loader
robustbench_loader()
from robustbench.model_zoo.architectures.wide_resnet import WideResNet
from coup_lib.paths import model_dir
path = model_dir() / "cifar10" / "Linf" / "Standard.pt"
path.parent.mkdir(parents=True)
torch.save({"state_dict": WideResNet(depth=28, widen_factor=10).state_dict()}, path)
model = load_classifier("cifar10", "Standard")
assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
assert not model.training and not any(p.requires_grad for p in model.parameters())
"""
    environment = {**os.environ, "COUP_MODELS": str(tmp_path), "COUP_SMOKE": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
