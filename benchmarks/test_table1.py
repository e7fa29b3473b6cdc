"""The paper's Table 1 by networks of its size: hours by counting, and attacks that say how true they are.

For a GPU, random weights. Without one a smoke run takes small networks, one image and two steps.
"""

from typing import Any

import pytest
import torch
from problems import DEVICE, PRECISIONS, Run, take_turns

from coup_lib.data import SHAPES, Images
from coup_lib.defences import PURIFIERS, build
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.run import attack
from coup_lib.evaluation.specs import AttackSpec
from coup_lib.networks.precision import products
from coup_lib.networks.zoo import load_classifier, load_score
from coup_lib.paths import is_smoke
from coup_lib.studies import grids
from workflow.estimate import Job, estimate, jobs

PAPER = {"profile": "cifar10", "budget": "full"}
SIZE = {"n_images": 16, "n_iter": 1, "eot": 4}
if DEVICE.type == "cpu":
    SIZE |= {"n_images": 1, "eot": 1, "n_steps": 2}
TRIED = ("diffpure", "coup")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not is_smoke(), reason="without a GPU only with COUP_SMOKE=1"
)


@pytest.mark.benchmark(group="table 1")
@pytest.mark.parametrize("kind", PRECISIONS)
def test_table1(benchmark: Any, kind: str) -> None:
    whole = estimate(jobs(grids.of_run("04_autoattack", PAPER | {"precision": kind})))
    config = Config(**PAPER | SIZE, precision=kind)
    # PGD asks once more than it steps, and looks at the image before and after.
    calls = (config.n_iter + 1) * config.eot, 2
    expected, runs = {}, {}
    for defence in TRIED:
        spec = against("pgd", defence)
        job = Job(config, config.classifier, spec, (), calls, config.n_images, done=False)
        expected[defence] = 3600 * estimate([job])["hours"]
        runs[defence] = prepared(config, spec)
    take_turns(
        benchmark,
        runs,
        1,
        warm_up=0,
        precision=kind,
        hours=whole["hours"],
        n_images=int(whole["images"]),
        expected=expected,
        tried=SIZE,
    )


def prepared(config: Config, spec: AttackSpec) -> Run:
    """An attack on a defence of random networks, at random images with the classes that it gives them."""
    dataset, where = config.setup.dataset, config.torch_device
    score = load_score(dataset, config.setup.score, trained=False, precision=config.precision).to(where)
    classifier = load_classifier(dataset, config.classifier, trained=False).to(where)
    path = {"t_star": config.t_star, "n_steps": config.n_steps, "guidance_weight": config.guidance_weight}
    model = build(PURIFIERS[spec.surrogate], classifier, score, classifier, gradient="exact", **path)
    x = torch.rand(config.n_images, *SHAPES[dataset], generator=torch.Generator().manual_seed(0)).to(where)
    with torch.no_grad():
        images = Images(x, classifier(x).argmax(1))

    def run() -> None:
        with products(config.precision):
            attack(model, images, spec, config, place=0, max_batch=config.max_batch)

    return run
