"""Settings are checked before any network is loaded; messages name what was expected and what came."""

import dataclasses
import json
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from coup_lib.attacks import NORM_LABELS
from coup_lib.checks import count, number
from coup_lib.evaluation.config import (
    BUDGETS,
    PROFILES,
    PURPOSES,
    SMOKE_STEPS,
    Config,
    check_names,
    from_notebook,
    radius,
)
from coup_lib.networks import checkpoints
from coup_lib.reporting import tables


@pytest.fixture(autouse=True)
def no_networks(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a network was loaded before the settings were checked")

    monkeypatch.setattr(checkpoints, "load_network", refuse)


@pytest.fixture
def no_smoke(monkeypatch):
    monkeypatch.delenv("COUP_SMOKE", raising=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"profile": "imagenet"},
            "profile: expected one of digits, cifar10-small, cifar10, cifar100; got 'imagenet'",
        ),
        ({"eps": "small"}, "eps: expected a number or a fraction such as \"8/255\"; got 'small'"),
        ({"eps": 8}, "eps: expected a number greater than 0 and at most 1; got 8"),
        ({"norm": "l2", "eps": 9}, "eps: expected a number greater than 0 and at most 8; got 9"),
        ({"norm": "l1nf"}, "norm: expected one of linf, l2; got 'l1nf'; did you mean linf?"),
        ({"budget": "FULL"}, "budget: expected one of smoke, quick, full; got 'FULL'; did you mean full?"),
        (
            {"n_images": 9999},
            "n_images of the test split: expected a whole number of at least 1 and at most 512; got 9999",
        ),
        ({"t_star": 0.5}, "t_star: expected a number greater than 1e-05 and at most 0.3; got 0.5"),
        (
            {"n_images": "many"},
            "n_images of the test split: expected a whole number of at least 1 and at most 512; got 'many'",
        ),
        (
            {"classifier": "resnet50"},
            "classifier: expected one of cnn-small, cnn-large, cnn-small-linf, cnn-small-l2; got 'resnet50'",
        ),
        ({"seed": -1}, "seed: expected a whole number of at least 0 and at most 2147483648; got -1"),
    ],
)
def test_bad_settings_are_refused(no_smoke, given, message):
    with pytest.raises(ValueError) as error:
        Config(**given)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("given", "expected"), [("8/255", 8 / 255), (0.03, 0.03), ("0.03", 0.03), ("1e-2", 0.01), (1, 1.0)]
)
def test_eps_is_a_number_or_a_fraction(given, expected):
    assert Config(eps=given).eps == pytest.approx(expected)


def test_none_means_the_profiles_own_value(no_smoke):
    config, digits = Config(norm="L2"), PROFILES["digits"]
    assert (config.norm, config.norm_label) == ("l2", "L2")
    assert config.eps == digits.eps["l2"] and config.t_star == digits.t_star["l2"]
    assert config.n_images == digits.budgets["report"]["quick"].n_images
    assert Config(n_images=1e2).n_images == 100


def test_the_full_budget_is_the_papers_protocol(no_smoke):
    config = Config(budget="full")
    sizes = (config.n_images, config.n_iter, config.eot, config.n_targets, config.square_queries)
    assert sizes == (512, 100, 20, 9, 5000)


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_purpose_picks_the_sizes(no_smoke, purpose, budget):
    config = Config(purpose=purpose, budget=budget)
    expected = dataclasses.asdict(PROFILES["digits"].budgets[purpose][budget])
    del expected["bpda_eot"]  # notebook 05's own, see test_bpda.py
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.n_steps == (SMOKE_STEPS if budget == "smoke" else PROFILES["digits"].n_steps["linf"])
    assert Config(purpose=purpose, budget=budget, eot=3).eot == 3  # and a size can still be told


def test_no_attack_spends_more_than_the_report():
    """Clean images are cheap: there may be more."""
    for purpose in set(PURPOSES) - {"clean"}:
        for name, budget in PROFILES["digits"].budgets[purpose].items():
            report = dataclasses.astuple(PROFILES["digits"].budgets["report"][name])
            assert all(a <= b for a, b in zip(dataclasses.astuple(budget), report, strict=True))


def test_a_small_split_gives_all_it_has(no_smoke):
    assert Config(budget="full", split="validation").n_images == 285


@pytest.mark.parametrize("norm", NORM_LABELS)
def test_a_norm_is_spelt_as_autoattack_does(norm):
    assert Config(norm=norm).norm_label == {"linf": "Linf", "l2": "L2"}[norm]
    assert norm in PROFILES["digits"].robust_classifiers


def test_the_same_settings_however_they_are_written():
    assert Config(eps="3/20", norm="LINF") == Config(eps=0.15)


def test_a_negative_weight_is_a_control_and_not_an_error():
    assert Config(guidance_weight=-0.5).guidance_weight == -0.5


@pytest.mark.parametrize("purpose", PURPOSES)
def test_smoke_makes_every_budget_small(monkeypatch, purpose):
    monkeypatch.setenv("COUP_SMOKE", "1")
    smoke = PROFILES["digits"].budgets[purpose]["smoke"]
    config = Config(budget="full", purpose=purpose)
    assert config.budget == "smoke" and config.n_images == smoke.n_images == 4
    assert config.n_steps == SMOKE_STEPS and Config(n_steps=7).n_steps == 7


def test_number_and_count():
    assert number("x", "8/255", 0) == 8 / 255
    assert count("x", "12", 20) == 12
    with pytest.raises(ValueError, match="whole number of at least 1; got True"):
        count("x", True)


def test_captions_say_where_attacks_did_not_compute_as_usual():
    assert Config(seed=3).seed_label == "seed 3"
    unusual = Config(precision="bfloat16")
    assert unusual.seed_label == "seed 0; attacked through a score network in bfloat16"
    assert unusual.seed_label in tables.caption(unusual)


@pytest.mark.parametrize(
    ("eps", "words"), [(8 / 255, "8/255"), (0.0470588235294, "12/255"), (0.5, "0.5"), (0.2, "0.2"), (1, "1")]
)
def test_a_radius_is_written_as_the_field_writes_it(eps, words):
    assert radius(eps) == words and number("eps", words, 0) == pytest.approx(eps)


def notebook(cell, **names):
    """The namespace that a kernel has after the parameter cells."""
    return {"In": ["", "# Parameters\nnorm: str = 'linf'\n", cell], **names}


def test_from_notebook_takes_the_parameters():
    config = from_notebook(Config, notebook("# Parameters\nnorm = 'l2'", norm="l2", other=1))
    assert config.norm == "l2"


def test_from_notebook_refuses_an_unknown_parameter():
    known = "budget, classifier, device, eot"
    with pytest.raises(ValueError, match=f"unknown parameter 'normm'; this notebook knows {known}"):
        from_notebook(Config, notebook("# Parameters\nnormm = 'l2'", norm="linf", normm="l2"))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("normm", "norm"),
        ("epsilon", "eps"),
        ("tstar", "t_star"),
        ("λ", "guidance_weight"),
        ("weight", "guidance_weight"),
        ("n", "n_images"),
        ("N", "n_steps"),
        ("steps", "n_steps"),
        ("iterations", "n_iter"),
        ("square_querys", "square_queries"),
        ("shards", "shard"),
    ],
)
def test_a_mistaken_parameter_is_told_what_may_be_meant(name, meant):
    with pytest.raises(ValueError, match=f"unknown parameter '{name}'; .*; did you mean {meant}\\?$"):
        from_notebook(Config, notebook(f"# Parameters\n{name} = 2"))
    with pytest.raises(ValueError, match=r"did you mean guidance_weights\?$"):  # what this notebook knows
        given = notebook("# Parameters\nweight = 2")
        from_notebook(Config, given, own=("guidance_weights",), guidance_weight=None)


@pytest.mark.parametrize(
    ("name", "meant"), [("lambda", "guidance_weight"), ("t*", "t_star"), ("n-images", "n_images")]
)
def test_a_parameter_that_is_no_name_in_python_is_told_so_too(name, meant):
    shell = TransformerManager()
    shell.cleanup_transforms.append(check_names)
    cell = f"# Parameters\nnorm = 'l2'\n{name} = 2\n"
    with pytest.raises(ValueError, match=rf"^unknown parameter '.*'; did you mean {meant}\?$") as error:
        shell.transform_cell(cell)
    assert repr(name) in str(error.value)
    for other in ("# Parameters\nnorm = 'l2'\n", f"# Another\n{name} = 2\n", "# Parameters\nx = )\n"):
        assert shell.transform_cell(other) == other


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_every_notebook_checks_names_before_its_parameters(path):
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert "input_transformers_cleanup.append(check_names)" in "".join(code[0]["source"])
    assert code[1]["source"][0] == "# Parameters\n"


def test_from_notebook_can_be_run_again_after_other_cells():
    """What later cells define is no parameter."""
    namespace = notebook("figure = 1\nbogus: int = 3", norm="linf", figure=1, bogus=3)
    assert from_notebook(Config, namespace).norm == "linf"


def test_what_a_notebook_fixes_is_not_the_users_to_choose(no_smoke, capsys):
    config = from_notebook(Config, notebook("# Parameters\nnorm = 'l2'", norm="l2"), purpose="compare")
    assert (config.norm, config.purpose) == ("l2", "compare")
    assert config.n_images == PROFILES["digits"].budgets["compare"]["quick"].n_images
    assert "purpose" not in capsys.readouterr().out  # fixed, not overridden
    given = notebook("# Parameters\npurpose = 'probe'", norm="linf", purpose="probe")
    with pytest.raises(ValueError, match="unknown parameter 'purpose'; this notebook knows") as error:
        from_notebook(Config, given, purpose="compare")
    assert "purpose" not in str(error.value).split("knows")[1]


def test_a_notebook_may_have_parameters_of_its_own():
    given = notebook("# Parameters\ntrials = 3", norm="l2", trials=3)
    assert from_notebook(Config, given, own=("trials",)).norm == "l2"
    with pytest.raises(ValueError, match=r"unknown parameter 'trials'; this notebook knows .* tries"):
        from_notebook(Config, given, own=("tries",))


def test_overrides_are_echoed(capsys):
    given = notebook("# Parameters\neps = '1/10'", norm="linf", eps="1/10")
    given["config"] = from_notebook(Config, given)
    from_notebook(Config, given, purpose="compare")  # the notebook's second configuration
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("override")]
    assert said == ["override: eps = '1/10' (default None)"]
