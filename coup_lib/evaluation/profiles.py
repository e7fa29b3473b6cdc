"""Profiles: data, networks and sizes. The code that runs is the same for every one."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Budget:
    """How much work an attack run does; to `report` in `full` is the paper's protocol."""

    n_images: int
    n_iter: int  # APGD and FAB iterations
    eot: int  # noise draws per gradient of APGD-ce and of AutoAttack's rand version
    n_targets: int  # target classes of APGD-t and FAB-t
    square_queries: int
    n_draws: int = 10  # noise draws per image when an attack is scored
    bpda_eot: tuple[int, ...] = (1, 5, 20)  # noise draws per gradient of Table 3; the paper does not say


@dataclass(frozen=True)
class Profile:
    """Data, networks and sizes."""

    dataset: str
    subset: str  # which test images, and in which order
    classifiers: tuple[str, ...]  # the first one is the default; notebook 02 compares them all
    robust_classifiers: dict[str, str]  # the first one's architecture, adversarially trained for each norm
    score: str
    eps: dict[str, float]
    t_star: dict[str, float]
    t_max: float  # the score network knows no later time
    guidance_weight: float
    n_steps: dict[str, int]
    chunk_size: int  # images attacked together; a killed run loses no more than one chunk
    max_batch: int  # images in one network call; EOT draws are batched up to this
    budgets: dict[str, dict[str, Budget]]  # purpose → budget


# What a run is for: a table of the paper; a few defences beside each other; many settings of one; a search
# among many; its rivals; many attacks; none, but clean images.
PURPOSES = ("report", "compare", "sweep", "search", "rivals", "probe", "clean")
BUDGETS = ("smoke", "quick", "full")
SMOKE_STEPS = 3
SMOKE = Budget(4, n_iter=2, eot=2, n_targets=1, square_queries=5, n_draws=2, bpda_eot=(1, 2))
FULL = {
    "report": Budget(n_images=512, n_iter=100, eot=20, n_targets=9, square_queries=5000),
    "compare": Budget(n_images=512, n_iter=20, eot=5, n_targets=9, square_queries=2000),
    "sweep": Budget(n_images=512, n_iter=16, eot=3, n_targets=9, square_queries=2000),
    "search": Budget(n_images=96, n_iter=16, eot=4, n_targets=9, square_queries=2000),
    "rivals": Budget(n_images=256, n_iter=16, eot=4, n_targets=9, square_queries=2000),
    "probe": Budget(n_images=64, n_iter=50, eot=20, n_targets=9, square_queries=2000),
    "clean": Budget(n_images=512, n_iter=1, eot=1, n_targets=1, square_queries=1),
}
QUICK_DIGITS = {
    "report": Budget(n_images=128, n_iter=20, eot=5, n_targets=3, square_queries=200),
    "compare": Budget(n_images=128, n_iter=10, eot=4, n_targets=3, square_queries=200, n_draws=5),
    "sweep": Budget(n_images=64, n_iter=10, eot=3, n_targets=3, square_queries=200),
    "search": Budget(n_images=32, n_iter=8, eot=3, n_targets=3, square_queries=200, n_draws=5),
    "rivals": Budget(n_images=32, n_iter=8, eot=3, n_targets=3, square_queries=200, n_draws=5),
    "probe": Budget(n_images=32, n_iter=20, eot=5, n_targets=3, square_queries=200),
    "clean": Budget(n_images=512, n_iter=1, eot=1, n_targets=1, square_queries=1, n_draws=2),
}
# Of the paper's networks, an hour on one large GPU rather than weeks: to see that all is in place.
QUICK_CIFAR = {purpose: Budget(16, n_iter=5, eot=2, n_targets=1, square_queries=20) for purpose in PURPOSES}

# Of small networks on a CPU, hours; on a GPU, an hour for all notebooks.
QUICK_CIFAR_SMALL = {
    "report": Budget(64, n_iter=10, eot=1, n_targets=1, square_queries=100),
    "compare": Budget(64, n_iter=10, eot=1, n_targets=1, square_queries=100),
    "sweep": Budget(64, n_iter=10, eot=1, n_targets=1, square_queries=100, n_draws=2, bpda_eot=(1, 5)),
    "search": Budget(16, n_iter=10, eot=1, n_targets=1, square_queries=100),
    "rivals": Budget(16, n_iter=10, eot=1, n_targets=1, square_queries=100),
    "probe": Budget(16, n_iter=10, eot=1, n_targets=1, square_queries=100),
    "clean": Budget(512, n_iter=1, eot=1, n_targets=1, square_queries=1, n_draws=2),
}


def _budgets(quick: dict[str, Budget]) -> dict[str, dict[str, Budget]]:
    return {purpose: {"smoke": SMOKE, "quick": quick[purpose], "full": FULL[purpose]} for purpose in PURPOSES}


CIFAR10 = Profile(
    dataset="cifar10",
    subset="paper",
    classifiers=("Standard", "wrn-70-16-dropout"),
    robust_classifiers={"linf": "Wang2023Better_WRN-28-10", "l2": "Wang2023Better_WRN-28-10@L2"},
    score="ddpmpp-deep",
    eps={"linf": 8 / 255, "l2": 0.5},
    t_star={"linf": 0.1, "l2": 0.075},
    t_max=1.0,
    guidance_weight=1.0,
    n_steps={"linf": 100, "l2": 75},
    chunk_size=64,
    max_batch=64,
    budgets=_budgets(QUICK_CIFAR),
)
PROFILES = {
    "digits": Profile(
        dataset="digits",
        subset="first",
        classifiers=("cnn-small", "cnn-large"),
        robust_classifiers={"linf": "cnn-small-linf", "l2": "cnn-small-l2"},
        score="score",
        # 8/255 is invisible to a digit classifier; 0.15 breaks it as 8/255 breaks one of CIFAR-10.
        eps={"linf": 0.15, "l2": 0.5},
        t_star={"linf": 0.1, "l2": 0.075},
        t_max=0.3,
        guidance_weight=1.0,
        n_steps={"linf": 10, "l2": 10},
        chunk_size=128,
        max_batch=1280,
        budgets=_budgets(QUICK_DIGITS),
    ),
    "cifar10-small": replace(
        CIFAR10,
        subset="first",
        # ResNet-18 is in the wheel of pyautoattack, but takes more time than the score network.
        classifiers=("resnet20", "resnet18"),
        robust_classifiers={"linf": "resnet20-linf", "l2": "resnet20-l2"},
        score="score-small",
        t_max=0.3,
        n_steps={"linf": 20, "l2": 15},
        chunk_size=32,
        max_batch=512,
        budgets=_budgets(QUICK_CIFAR_SMALL),
    ),
    "cifar10": CIFAR10,
    "cifar100": replace(
        CIFAR10,
        dataset="cifar100",
        classifiers=("wrn-40-2",),
        # RobustBench has none for CIFAR-100 that was trained for L2.
        robust_classifiers=dict.fromkeys(("linf", "l2"), "Wang2023Better_WRN-28-10"),
        score="edm-vp",
    ),
}
