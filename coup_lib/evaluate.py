"""Attack sources × targets: images are made once per source, and scored on every target on fresh noise."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coup_lib import purify
from coup_lib.attacks import ATTACKS, run_attack
from coup_lib.checkpoints import load_network, read_sums
from coup_lib.config import DEFENCES, GRADIENTS, Config, choice
from coup_lib.data import Images, load_split
from coup_lib.outcomes import Score
from coup_lib.progress import Plan
from coup_lib.records import Progress, chunked_record, is_complete, record_path
from coup_lib.score import NoiseScore

# What a run's seed is spent on; each use has a stream of its own.
ATTACK, DEFENCE, REPORT, SELECT = range(4)
GUIDED = ("coup",)


@dataclass(frozen=True)
class Source:
    """Where adversarial images come from: an attack on a defence with a gradient of it."""

    attack: str
    defence: str
    gradient: str = "exact"

    def __post_init__(self) -> None:
        choice("attack", self.attack, ATTACKS)
        choice("defence", self.defence, DEFENCES)
        choice("gradient", self.gradient, GRADIENTS)
        # Without guidance there is no second-order term, without a purifier only one gradient.
        same = self.defence == "none" or (self.gradient == "first_order" and self.defence not in GUIDED)
        if same or self.attack == "clean":
            object.__setattr__(self, "gradient", "exact")
        if self.attack == "clean":
            object.__setattr__(self, "defence", "none")

    def __str__(self) -> str:
        return "clean" if self.attack == "clean" else f"{self.attack} on {self.defence} ({self.gradient})"


CLEAN = Source("clean", "none")


class Evaluation:
    """Runs sources and scores targets for one classifier under one configuration.

    Networks are loaded when the first record is missing, not before.

    Args:
        classifier: one of the profile's classifiers; None is its first.
        verbose: print progress with an estimate of the time left.
    """

    def __init__(self, config: Config, classifier: str | None = None, *, verbose: bool = True) -> None:
        known = config.sizes.classifiers
        self.config = config
        self.classifier_name = choice("classifier", classifier or known[0], known)
        self.verbose = verbose
        self._attacks: dict[Source, dict[str, Any]] = {}

    @cached_property
    def images(self) -> Images:
        """The images under attack."""
        return load_split(self.config.sizes.dataset, self.config.split).first(self.config.n_images)

    @cached_property
    def classifier(self) -> nn.Module:
        """The undefended classifier."""
        return load_network(self.config.sizes.dataset, self.classifier_name)

    @cached_property
    def score_network(self) -> nn.Module:
        """s(x, t) of the profile."""
        return NoiseScore(load_network(self.config.sizes.dataset, self.config.sizes.score))

    def defence(self, name: str, gradient: str = "exact") -> nn.Module:
        """The named defence around the classifier, ready to be attacked."""
        choice("defence", name, DEFENCES)
        if name == "none":
            return self.classifier
        settings: dict[str, Any] = {
            "t_star": self.config.t_star,
            "n_steps": self.config.n_steps,
            "gradient": gradient,
        }
        if name in GUIDED:
            settings["guidance_weight"] = self.config.guidance_weight
        build = {"diffpure": purify.diffpure, "reverse": purify.reverse_only, "coup": purify.coup}[name]
        return build(self.classifier, self.score_network, **settings)

    def run(self, targets: dict[str, Sequence[Source]]) -> dict[str, dict[Source, Score]]:
        """All sources on all targets: target → source → score. Finished records are read back."""
        sources = list(dict.fromkeys(source for row in targets.values() for source in row))
        costs = [0.0 if self._is_done(source) else self._cost(source) for source in sources]
        plan = Plan(costs, verbose=self.verbose)
        for source in sources:
            plan.start(f"{self.classifier_name}: {source}")
            self.attack(source, plan.advance)
        plan.end()
        return {
            target: {source: self.score(target, source) for source in dict.fromkeys(row)}
            for target, row in targets.items()
        }

    def columns(self, defences: Sequence[str], protocol: Sequence[str] = ()) -> dict[str, dict[str, Score]]:
        """The columns that every robustness table here has: defence → column → score.

        clean; the attacks of `protocol` on the defence itself; adaptive (APGD-ce with `config.gradient`);
        first_order (APGD-ce without the second-order guidance term); from_none and from_reverse (APGD-ce's
        images against the undefended classifier and against reverse-only). `outcomes.worst_of` all of them
        is the column that a claim of robustness has to stand on.
        """
        gradient = self.config.gradient
        rows = {
            defence: {
                "clean": CLEAN,
                **{attack: Source(attack, defence, gradient) for attack in protocol},
                "adaptive": Source("apgd-ce", defence, gradient),
                "first_order": Source("apgd-ce", defence, "first_order"),
                "from_none": Source("apgd-ce", "none"),
                "from_reverse": Source("apgd-ce", "reverse"),
            }
            for defence in defences
        }
        scores = self.run({defence: list(row.values()) for defence, row in rows.items()})
        return {
            defence: {column: scores[defence][source] for column, source in row.items()}
            for defence, row in rows.items()
        }

    def warnings(self, defence: str, attacks: Sequence[str]) -> list[str]:
        """What AutoAttack said of a defence in these attacks, each sentence once."""
        said = [self.attack(Source(attack, defence, self.config.gradient)) for attack in attacks]
        return list(dict.fromkeys(text for record in said for text in record["result"]["warnings"]))

    def attack(self, source: Source, progress: Progress | None = None) -> dict[str, Any]:
        """The record of a source: AutoAttack's verdicts and warnings, and the images under "arrays"."""
        config, size = self.config, self.config.sizes.chunk_size
        starts = range(0, config.n_images, size)

        def compute(start: int) -> dict[str, Any]:
            chunk = Images(self.images.x[start : start + size], self.images.y[start : start + size])
            model = self.defence(source.defence, source.gradient)
            if isinstance(model, purify.Purified):
                model.purifier.reseed(_seed(config.seed, DEFENCE, start))
            budget = {
                name: getattr(config, name) for name in ("n_iter", "eot", "n_targets", "square_queries")
            }
            result = run_attack(
                source.attack,
                model,
                chunk.x,
                chunk.y,
                norm=config.norm_label,
                eps=config.eps,
                seed=_seed(config.seed, ATTACK, start) % 2**31,
                max_batch=config.sizes.max_batch,
                **budget,
            )
            return {
                "robust": result.robust.int().tolist(),
                "warnings": list(result.warnings),
                "x_adv": result.x_adv.numpy(),
            }

        def combine(parts: list[dict[str, Any]]) -> dict[str, Any]:
            return {
                "robust": [value for part in parts for value in part["robust"]],
                "warnings": list(dict.fromkeys(text for part in parts for text in part["warnings"])),
                "x_adv": np.concatenate([part["x_adv"] for part in parts]),
            }

        if source not in self._attacks:  # every target asks for it again
            name, settings = self.attack_settings(source)
            record = chunked_record(config.profile, name, settings, starts, compute, combine, progress)
            self._attacks[source] = record
        return self._attacks[source]

    def score(self, target: str, source: Source) -> Score:
        """The target's predictions on the source's images, on noise that no attack has seen."""
        config, size = self.config, self.config.sizes.chunk_size

        def compute(start: int) -> dict[str, Any]:
            x_adv = torch.from_numpy(self.attack(source)["arrays"]["x_adv"][start : start + size])
            labels, model = self.images.y[start : start + size], self.defence(target)
            selecting = self._probabilities(model, x_adv, SELECT, start)
            right = (selecting.argmax(2) == labels[:, None]).float().mean(1)
            trust = selecting[torch.arange(len(labels)), :, labels].mean(1)
            return {
                "labels": labels.tolist(),
                "report": self._probabilities(model, x_adv, REPORT, start).argmax(2).tolist(),
                "suspicion": (right + trust / 1000).tolist(),
            }

        def combine(parts: list[dict[str, Any]]) -> dict[str, Any]:
            result = {key: [value for part in parts for value in part[key]] for key in parts[0]}
            return result | {"accuracy": self._as_score(target, source, result).summary()}

        attack_name, attack_settings = self.attack_settings(source)
        settings = {
            "target": self.defence_settings(target),
            "n_draws": config.n_draws,
            "seed": config.seed,
            "attack": attack_settings,
        }
        name = f"score-{target}-on-{attack_name}"
        starts = range(0, config.n_images, size)
        record = chunked_record(config.profile, name, settings, starts, compute, combine)
        return self._as_score(target, source, record["result"])

    def _as_score(self, target: str, source: Source, result: dict[str, Any]) -> Score:
        own = source.defence == target and source.attack != "clean"
        robust = np.array(self.attack(source)["result"]["robust"], dtype=bool) if own else None
        labels, report, suspicion = (np.array(result[key]) for key in ("labels", "report", "suspicion"))
        return Score(labels, report, suspicion, robust)

    def _probabilities(self, model: nn.Module, x: Tensor, purpose: int, start: int) -> Tensor:
        """p(y|x), (n, n_draws, K); an image's noise depends on the run's seed and its place only."""
        draws = self.config.n_draws
        if not isinstance(model, purify.Purified):
            with torch.no_grad():
                return model(x).softmax(1)[:, None].expand(-1, draws, -1)
        seeds = image_seeds(self.config.seed, purpose, range(start, start + len(x)), draws)
        repeated = x.repeat_interleave(draws, dim=0)
        size = self.config.sizes.max_batch
        with torch.no_grad():
            parts = [
                model(images, seeds=chosen).softmax(1)
                for images, chosen in zip(repeated.split(size), seeds.flatten().split(size), strict=True)
            ]
        return torch.cat(parts).reshape(len(x), draws, -1)

    def attack_settings(self, source: Source) -> tuple[str, dict[str, Any]]:
        """A readable name for the record and everything that its numbers depend on."""
        config = self.config
        settings: dict[str, Any] = {
            "attack": source.attack,
            "dataset": config.sizes.dataset,
            "split": config.split,
            "n_images": config.n_images,
        }
        if source.attack == "clean":
            return f"{self.classifier_name}-clean", settings
        spent = {
            "apgd-ce": ("n_iter", "eot"),
            "rand": ("n_iter", "eot"),
            "standard": ("n_iter", "n_targets", "square_queries"),
        }[source.attack]
        settings |= {
            "classifier": self.classifier_name,
            "norm": config.norm,
            "eps": config.eps,
            "gradient": source.gradient,
            "seed": config.seed,
            "chunk_size": config.sizes.chunk_size,
            "budget": {name: getattr(config, name) for name in spent},
            "defence": self.defence_settings(source.defence),
        }
        name = f"{self.classifier_name}-{config.norm}-{source.attack}-{source.defence}-{source.gradient}"
        return name, settings

    def defence_settings(self, name: str) -> dict[str, Any]:
        """What a defence's behaviour depends on: its networks by hash, and its own settings."""
        config, dataset = self.config, self.config.sizes.dataset
        settings: dict[str, Any] = {
            "name": name,
            "classifier": self.classifier_name,
            "classifier_sha256": _sha256(dataset, self.classifier_name),
        }
        if name != "none":
            settings |= {
                "score_sha256": _sha256(dataset, config.sizes.score),
                "t_star": config.t_star,
                "n_steps": config.n_steps,
            }
        if name in GUIDED:
            settings["guidance_weight"] = config.guidance_weight
        return settings

    def _is_done(self, source: Source) -> bool:
        return is_complete(record_path(self.config.profile, *self.attack_settings(source)))

    def _cost(self, source: Source) -> float:
        """About how many score evaluations the attack takes per image; good enough to foretell the time."""
        config = self.config
        gradients = {
            "clean": 0.0,
            "apgd-ce": config.n_iter * config.eot,
            "rand": 2 * config.n_iter * config.eot,
            "standard": config.n_iter * (1 + 2 * config.n_targets),
        }[source.attack]
        forwards = config.square_queries if source.attack == "standard" else 0
        steps = {"none": 0.1, "coup": 2 * config.n_steps}.get(source.defence, config.n_steps)
        return float(config.n_images * steps * (3 * gradients + forwards) + 1)


def _seed(run_seed: int, purpose: int, place: int) -> int:
    """A 62-bit seed for one use of the run's seed."""
    return int(image_seeds(run_seed, purpose, [place], draws=1))


def image_seeds(run_seed: int, purpose: int, places: Iterable[int], draws: int) -> Tensor:
    """(n, draws) int64 noise seeds of the images at these places of the split."""
    rows = [
        np.random.SeedSequence([run_seed, purpose, place]).generate_state(draws, np.uint64)
        for place in places
    ]
    return torch.from_numpy((np.stack(rows) >> np.uint64(2)).astype(np.int64))


def _sha256(dataset: str, network: str) -> str:
    """The recorded digest of a network's weights; loading them checks that it is theirs."""
    return read_sums()[f"{dataset}/{network}.safetensors"][:16]
