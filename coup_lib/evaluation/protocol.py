"""The strict protocol on a profile's images: what each defence faces, and its worst case on record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from coup_lib.data import load_split
from coup_lib.defences import PURIFIERS
from coup_lib.evaluation.bench import Bench, against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.identity import of_split
from coup_lib.evaluation.outcomes import Predictions, WorstCase, worst_case
from coup_lib.evaluation.recorded import recorded_predictions
from coup_lib.evaluation.run import Runner
from coup_lib.evaluation.specs import CLEAN, AttackSpec, Rows, with_transfers


class Evaluation(Runner):
    """Attacks on the named defences around one classifier, on a profile's images.

    Args:
        classifier: takes the place of the configuration's.
        verbose: print progress with an estimate of the time left.
        by_name: name records by the names of networks and images, so that none needs to be here.
    """

    config: Config
    bench: Bench

    def __init__(
        self,
        config: Config,
        classifier: str | None = None,
        *,
        verbose: bool = True,
        by_name: bool = False,
    ) -> None:
        super().__init__(
            config,
            Bench(config, classifier, by_name=by_name),
            lambda: load_split(config.setup.dataset, config.split, config.subset),
            lambda: images_identity(config, by_name=by_name),
            verbose=verbose,
        )

    def columns(
        self, defences: Sequence[str], *, autoattack: bool = False
    ) -> dict[str, dict[Any, Predictions]]:
        """The columns that every robustness table here has, see `paper_attacks`: defence → key → score."""
        return self.predictions(paper_attacks(defences, self.config, autoattack=autoattack))

    def recorded(self, rows: Mapping[str, Mapping[str, Predictions]]) -> dict[str, WorstCase]:
        """Target → its worst case over all of its scores in the store, these among them."""
        classifier, images, found = self.bench.classifier_name, self._images()["images"], {}
        for target, row in rows.items():
            settings = self.bench.settings(target)
            scores = recorded_predictions(self.config, classifier, target, settings, images)
            found[target] = worst_case(scores or [*row.values()])
        return found

    def warnings(self, defence: str) -> list[str]:
        """What AutoAttack said of a defence in its two versions, each sentence once."""
        row = paper_attacks([defence], self.config, autoattack=True)[defence]
        said = [self.attack(row[name])["result"]["warnings"] for name in ("standard", "adaptive", "dlr")]
        return list(dict.fromkeys(text for texts in said for text in texts))


def images_identity(config: Config, *, by_name: bool = False) -> dict[str, Any]:
    """What identifies a configuration's images: data set, split, and the pixels (or their name)."""
    named = config.setup.dataset, config.split, config.subset
    which = config.subset if by_name else of_split(*named, config.n_images)
    return {"dataset": config.setup.dataset, "split": config.split, "images": which}


def paper_attacks(
    defences: Sequence[str], config: Config, *, autoattack: bool = False
) -> dict[str, dict[Any, AttackSpec]]:
    """What each defence faces by the paper's protocol and beside it: defence → key → attack.

    clean; adaptive (APGD-ce with `config.gradient`); first_order (APGD-ce without the second-order guidance
    term); from_none and from_reverse (APGD-ce's images against the undefended classifier and against the
    reverse SDE). With autoattack also standard and dlr (APGD-dlr, the other half of AutoAttack's "rand").
    A claim of robustness has to stand on the worst case, see `Evaluation.recorded`.
    """
    rows: dict[str, dict[str, AttackSpec]] = {}
    for defence in defences:
        row = rows[defence] = {
            "clean": CLEAN,
            "adaptive": against("apgd-ce", defence, config.gradient),
            "first_order": against("apgd-ce", defence, "first_order"),
            "from_none": against("apgd-ce", "none"),
            "from_reverse": against("apgd-ce", "reverse"),
        }
        if autoattack:
            row["standard"] = against("standard", defence, config.gradient)
            # Noise of its own: by the second half of "rand", AutoAttack's generator has gone on.
            row["dlr"] = against("apgd-dlr", defence, config.gradient, seed=config.seed + 1)
    return with_transfers(rows)


@dataclass(frozen=True)
class Experiment:
    """A part of a study: targets, each on the images of its attacks, under one configuration.

    attacks: target → key → attack. classifier: takes the place of the configuration's.
    """

    config: Config
    attacks: Rows
    classifier: str | None = None

    def predictions(self) -> dict[str, dict[Any, Predictions]]:
        """`Runner.predictions` of the attacks: target → key → score."""
        return Evaluation(self.config, self.classifier).predictions(self.attacks)

    @property
    def classifiers(self) -> list[str]:
        """The classifier that decides, and the robust one where that guides."""
        named = {spec.surrogate for row in self.attacks.values() for spec in row.values()} | {*self.attacks}
        recipes = [PURIFIERS[name] for name in sorted(named - {"none"})]
        norms = [recipe.guide_norm(self.config.norm) for recipe in recipes if recipe.robust_guide]
        robust = [self.config.setup.robust_classifiers[norm] for norm in norms]
        return list(dict.fromkeys([self.classifier or self.config.classifier, *robust]))


@dataclass(frozen=True)
class Measurement:
    """A part of a study that is no attack: gradients and forward passes of a defence, per image.

    Whether it is on record is not asked for: it counts as done when all attacks of its grid are.
    """

    config: Config
    defence: str
    calls: tuple[int, int]
    n_images: int


Grid: TypeAlias = Sequence[Experiment | Measurement]
