"""Attack sources × targets: images are made once per source, and scored on every target on fresh noise."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from coup_lib.attacks import ATTACKS, Attack
from coup_lib.checks import choice, count
from coup_lib.compiled import compiled_score
from coup_lib.config import Config
from coup_lib.data import Images, fingerprint, is_here, load_split
from coup_lib.defences import DEFENCES, MAXIMISERS, PURIFIERS, Recipe, build, is_guided, purifications
from coup_lib.gradients import GRADIENTS
from coup_lib.likelihood import LR, N_STEPS, SIGMA
from coup_lib.outcomes import Score, WorstCase, worst_case
from coup_lib.precision import check_precision, products
from coup_lib.progress import Plan
from coup_lib.purify import FixedNoise, Purified, together
from coup_lib.recorded import recorded_scores
from coup_lib.records import ChunkedRecord, Progress, Worker, is_complete, record_path
from coup_lib.zoo import check_classifier, digest, load_classifier, load_score, missing

T = TypeVar("T")

# What a run's seed is spent on; each use has a stream of its own.
ATTACK, DEFENCE, REPORT, SELECT = range(4)
# What an attack's numbers depend on, beside the images and the threat.
SPENT = {
    "clean": (),
    "noise": (),
    "fgsm": ("eot",),
    "square": ("square_queries",),
    "standard": ("n_iter", "n_targets", "square_queries"),
}
ITERATED = ("n_iter", "eot")
# Gradients that cost and depend on the choice of one; noise and Square ask for none.
WITHOUT_GRADIENT = ("clean", "noise", "square")


@dataclass(frozen=True)
class Source:
    """Where adversarial images come from: an attack on a defence with a gradient of it.

    n_iter, eot, n_steps, guidance_weight and seed, where given, take the place of the configuration's:
    n_steps that of the path under attack (a coarser one may stand in for the true one), seed that of attack
    and defence.
    fixed_noise: the defence under attack draws the same noise every time. start: where the attack begins.
    """

    attack: str
    defence: str
    gradient: str = "exact"
    n_iter: int | None = None
    eot: int | None = None
    n_steps: int | None = None
    seed: int | None = None
    fixed_noise: bool = False
    start: "Source | None" = None
    guidance_weight: float | None = None

    def __post_init__(self) -> None:
        choice("attack", self.attack, ATTACKS)
        choice("defence", self.defence, DEFENCES)
        choice("gradient", self.gradient, GRADIENTS)
        for name in ("n_iter", "eot", "n_steps"):
            if getattr(self, name) is not None:
                count(name, getattr(self, name))
        # Without guidance there is no second-order term, without a purifier only one gradient.
        same = self.defence == "none" or (self.gradient == "first_order" and not is_guided(self.defence))
        if same or self.attack in WITHOUT_GRADIENT:
            object.__setattr__(self, "gradient", "exact")
        if not is_guided(self.defence):
            object.__setattr__(self, "guidance_weight", None)
        if self.attack in ("clean", "noise"):
            object.__setattr__(self, "defence", "none")

    def __str__(self) -> str:
        if self.attack in ("clean", "noise"):
            return self.attack
        kind = "" if self.attack in WITHOUT_GRADIENT else f", {self.gradient}"
        more = "".join(
            f", {name} {getattr(self, name)}"
            for name in ("n_iter", "eot", "n_steps", "guidance_weight", "seed")
            if getattr(self, name) is not None
        )
        more += ", fixed noise" if self.fixed_noise else ""
        more += f", from {self.start}" if self.start else ""
        return f"{self.attack} on {self.defence}{kind}{more}"


CLEAN = Source("clean", "none")
OF = " of "  # in the name of a source that another target lends


@dataclass(frozen=True)
class Job:
    """A source that a run needs, and the targets it is scored on.

    record: jobs with the same one read the same record. done: it is there. shared: another job makes it.
    measured: of what is no attack, the gradients and forward passes of the source's defence, per image.
    """

    config: Config
    classifier: str
    source: Source
    targets: tuple[str, ...]
    record: str
    done: bool = False
    shared: bool = False
    measured: tuple[int, int] | None = None

    @property
    def calls(self) -> tuple[int, int]:
        """As `calls`, of the attack if it is this job's."""
        return (0, 0) if self.shared else self.measured or calls(self.source, self.config)

    @property
    def makes_images(self) -> bool:
        """Whether it leaves attacked images on disk."""
        return not self.shared and self.measured is None

    @property
    def classifiers(self) -> list[str]:
        """All that it takes: the one that decides, and where the robust one guides that, too."""
        guided = any(PURIFIERS[name].robust_guide for name in {self.source.defence, *self.targets} - {"none"})
        return [self.classifier, *[self.config.sizes.robust_classifiers[self.config.norm]] * guided]


_planned: ContextVar[list[Job] | None] = ContextVar("planned", default=None)


@contextmanager
def planning() -> Iterator[list[Job]]:
    """In here evaluations compute nothing: they list what they would do, and call every draw right."""
    jobs: list[Job] = []
    token = _planned.set(jobs)
    try:
        yield jobs
    finally:
        _planned.reset(token)


class Evaluation:
    """Runs sources and scores targets for one classifier under one configuration.

    Networks are loaded when the first record is missing, not before.

    Args:
        classifier: takes the place of the configuration's.
        verbose: print progress with an estimate of the time left.
        trained: False takes random weights where trained ones would have to be fetched.
    """

    recipes: Mapping[str, Recipe] = PURIFIERS  # of `defence`, by name

    def __init__(
        self, config: Config, classifier: str | None = None, *, verbose: bool = True, trained: bool = True
    ) -> None:
        self.config, self.trained = config, trained
        self.classifier_name = check_classifier(config.sizes.dataset, classifier or config.classifier)
        self.verbose = verbose
        self.max_batch = config.sizes.max_batch
        self._attacks: dict[Source, dict[str, Any]] = {}
        self._images: dict[Source, np.ndarray] = {}

    @cached_property
    def images(self) -> Images:
        """The images under attack, on the configured device."""
        config = self.config
        images = load_split(config.sizes.dataset, config.split, config.subset)
        return images.first(config.n_images).to(config.torch_device)

    @cached_property
    def classifier(self) -> nn.Module:
        """The undefended classifier."""
        return self._classifier(self.classifier_name)

    @cached_property
    def score_network(self) -> nn.Module:
        """s(x, t) of the profile, in float32."""
        return self._score_network("float32")

    @cached_property
    def attacked_network(self) -> nn.Module:
        """The same in the precision of attacks."""
        precision = self.config.precision
        return self.score_network if precision == "float32" else self._score_network(precision)

    def attacked_score(self, defence: str, gradient: str) -> nn.Module:
        """What an attack by this gradient on this purifier meets for its score, compiled where it can be."""
        if not self._compiles(defence, gradient):
            return self.attacked_network
        config = self.config
        return compiled_score(config.sizes.dataset, config.sizes.score, config.precision, config.torch_device)

    def _compiles(self, defence: str, gradient: str) -> bool:
        """Not for second derivatives of the score, nor for torchsde, which goes through one graph twice."""
        possible = defence in PURIFIERS and not PURIFIERS[defence].through_score and gradient != "adjoint"
        return self.config.compiled and possible

    def _score_network(self, precision: str) -> nn.Module:
        config = self.config
        network, dataset = config.sizes.score, config.sizes.dataset
        score = load_score(dataset, network, trained=self.trained, precision=precision)
        return score.to(config.torch_device)

    def _classifier(self, name: str) -> nn.Module:
        classifier = load_classifier(self.config.sizes.dataset, name, trained=self.trained)
        return classifier.to(self.config.torch_device)

    def defence(
        self,
        name: str,
        gradient: str = "exact",
        n_steps: int | None = None,
        guidance_weight: float | None = None,
        *,
        attacked: bool = False,
    ) -> nn.Module:
        """The named defence around the classifier, ready to be attacked.

        n_steps, guidance_weight: take the place of the configuration's.
        attacked: with the score network in the precision of attacks, compiled if the configuration says so.
        """
        choice("defence", name, DEFENCES)
        if name == "none":
            return self.classifier
        recipe = self.recipes[name]
        return build(
            recipe,
            self.classifier,
            self.attacked_score(name, gradient) if attacked else self.score_network,
            self._classifier(self._guide) if recipe.robust_guide else self.classifier,
            guidance_weight=self.config.guidance_weight if guidance_weight is None else guidance_weight,
            t_star=self.config.t_star,
            n_steps=n_steps or self.config.n_steps,
            gradient=gradient,
        )

    @property
    def _guide(self) -> str:
        return self.config.sizes.robust_classifiers[self.config.norm]

    def run(self, targets: dict[str, Sequence[Source]]) -> dict[str, dict[Source, Score]]:
        """All sources on all targets: target → source → score. Finished records are read back."""
        sources = list(dict.fromkeys(source for row in targets.values() for source in row))
        if (jobs := _planned.get()) is not None:
            jobs += [self._job(source, targets) for source in sources]
            return {target: dict.fromkeys(row, self._all_right()) for target, row in targets.items()}
        rows = {target: list(dict.fromkeys(row)) for target, row in targets.items()}
        attacks = [0.0 if self._is_done(source) else self._cost(source) for source in sources]
        plan = Plan(attacks + [self._scoring_cost(*row) for row in rows.items()], verbose=self.verbose)
        for source in sources:
            plan.start(f"{self.classifier_name}: {source}")
            self._attack_record(source).share(plan.advance)
        for target, row in rows.items():
            plan.start(f"{self.classifier_name}: {target} on images of {len(row)} sources")
            for place, source in enumerate(row, start=1):
                self._score_record(target, source).share()
                plan.advance(place, len(row))
        plan.end()
        return {
            target: {source: self.score(target, source) for source in row} for target, row in rows.items()
        }

    def plans(
        self,
        describe: Callable[[bool], tuple[str, dict[str, Any]]],
        target: str,
        calls: tuple[int, int],
        n_images: int | None = None,
    ) -> bool:
        """In `planning`, list a measurement that is no attack, and say that there is nothing to compute.

        Args:
            describe: with by_name or without, the name and the settings of its record.
            target: whose gradients and forward passes are in calls, per image.
            n_images: how many images it takes, if not all.
        """
        if (jobs := _planned.get()) is None:
            return False
        config, profile = replace(self.config, n_images=n_images or self.config.n_images), self.config.profile
        record, source = record_path(profile, *describe(True)).stem, Source("apgd-ce", target)
        job = Job(config, self.classifier_name, source, (), record, measured=calls)
        done = self._at_hand(job) and is_complete(record_path(profile, *describe(False)))
        jobs.append(replace(job, done=done))
        return True

    def columns(self, defences: Sequence[str], *, autoattack: bool = False) -> dict[str, dict[str, Score]]:
        """The columns that every robustness table here has: defence → column → score.

        clean; adaptive (APGD-ce with `config.gradient`); first_order (APGD-ce without the second-order
        guidance term); from_none and from_reverse (APGD-ce's images against the undefended classifier and
        against reverse-only). With autoattack also standard and dlr (APGD-dlr, the other half of AutoAttack's
        "rand"). All of it is lent, see `lend`. A claim of robustness has to stand on the worst case, see
        `recorded`.
        """
        gradient = self.config.gradient
        rows = {
            defence: {
                "clean": CLEAN,
                "adaptive": Source("apgd-ce", defence, gradient),
                "first_order": Source("apgd-ce", defence, "first_order"),
                "from_none": Source("apgd-ce", "none"),
                "from_reverse": Source("apgd-ce", "reverse"),
            }
            for defence in defences
        }
        if autoattack:
            for defence, row in rows.items():
                row |= self._autoattack(defence)
        return self.scores(lend(rows))

    def scores(self, rows: dict[str, dict[str, Source]]) -> dict[str, dict[str, Score]]:
        """`run` with a name for each source: target → name → score."""
        found = self.run({target: list(row.values()) for target, row in rows.items()})
        return {
            target: {name: found[target][source] for name, source in row.items()}
            for target, row in rows.items()
        }

    def recorded(self, rows: Mapping[str, Mapping[str, Score]]) -> dict[str, WorstCase]:
        """Target → its worst case over all of its scores in the store, these among them."""
        return {
            target: worst_case(self._on_record(target) or [*row.values()]) for target, row in rows.items()
        }

    def _on_record(self, target: str) -> list[Score]:
        if _planned.get() is not None:
            return []
        return recorded_scores(self.config, self.classifier_name, target, self.defence_settings(target))

    def _autoattack(self, defence: str) -> dict[str, Source]:
        """What AutoAttack takes beside APGD-ce.

        APGD-dlr, the other half of "rand", draws noise of its own: AutoAttack's generator has gone on by then.
        """
        gradient = self.config.gradient
        return {
            "standard": Source("standard", defence, gradient),
            "dlr": Source("apgd-dlr", defence, gradient, seed=self.config.seed + 1),
        }

    def warnings(self, defence: str) -> list[str]:
        """What AutoAttack said of a defence in its two versions, each sentence once."""
        sources = [Source("apgd-ce", defence, self.config.gradient), *self._autoattack(defence).values()]
        said = [self.attack(source) for source in sources]
        return list(dict.fromkeys(text for record in said for text in record["result"]["warnings"]))

    def attack(self, source: Source, progress: Progress | None = None) -> dict[str, Any]:
        """The record of a source: AutoAttack's verdicts and warnings under "result"."""
        if source not in self._attacks:  # every target asks for it again
            self._attacks[source] = self._attack_record(source).finish(progress)
        return self._attacks[source]

    def _attack_record(self, source: Source) -> ChunkedRecord:
        config, size = self.config, self.config.sizes.chunk_size
        seed = config.seed if source.seed is None else source.seed

        def compute(start: int) -> dict[str, Any]:
            check_precision(self._precision(source), config.torch_device)
            chunk = Images(self.images.x[start : start + size], self.images.y[start : start + size])
            begin = self._x_adv(source.start, start) if source.start else None
            path = (source.n_steps, source.guidance_weight)
            model = self.defence(source.defence, source.gradient, *path, attacked=True)
            attack = Attack(
                source.attack,
                config.norm_label,
                config.eps,
                seed=_seed(seed, ATTACK, start) % 2**31,
                n_iter=source.n_iter or config.n_iter,
                eot=source.eot or config.eot,
                n_targets=config.n_targets,
                square_queries=config.square_queries,
                max_batch=together(model, chunk.x, self.max_batch),
            )
            if isinstance(model, Purified):
                model.purifier.reseed(_seed(seed, DEFENCE, start))
                model = FixedNoise(model, _seed(seed, DEFENCE, start)) if source.fixed_noise else model
            with products(self._precision(source)):
                result = attack(model, chunk.x, chunk.y, begin)
            return {
                "robust": result.robust.int().tolist(),
                "warnings": list(result.warnings),
                "x_adv": result.x_adv.cpu().numpy(),
            }

        def combine(parts: list[dict[str, Any]]) -> dict[str, Any]:
            return {
                "robust": [value for part in parts for value in part["robust"]],
                "warnings": list(dict.fromkeys(text for part in parts for text in part["warnings"])),
                "x_adv": np.concatenate([part["x_adv"] for part in parts]),
            }

        name, settings = self.attack_settings(source)
        return replace(self._record(name, settings, compute, combine), apart=True)

    def _record(
        self,
        name: str,
        settings: dict[str, Any],
        compute: Callable[[int], dict[str, Any]],
        combine: Callable[[list[dict[str, Any]]], dict[str, Any]],
    ) -> ChunkedRecord:
        """A record over all images; `compute` gets the place of a chunk's first image."""
        config = self.config
        starts = range(0, config.n_images, config.sizes.chunk_size)
        worker = Worker(config.shard, config.num_shards)
        return ChunkedRecord(config.profile, name, settings, starts, self._fitting(compute), combine, worker)

    def _x_adv(self, source: Source, start: int) -> Tensor:
        """The source's images of the chunk that begins at `start`."""
        stop = start + self.config.sizes.chunk_size
        return self.x_adv(source)[start:stop]

    def x_adv(self, source: Source) -> Tensor:
        """The source's images (n, C, H, W), on the configured device; made again where they are not here."""
        if source not in self._images:  # every target asks for them again
            self._images[source] = self._attack_record(source).arrays()["x_adv"]
        return torch.from_numpy(self._images[source]).to(self.config.torch_device)

    def _fitting(self, compute: Callable[[int], T]) -> Callable[[int], T]:
        """compute, done again with half the batch as long as memory runs out."""

        def fitting(start: int) -> T:
            while True:
                try:
                    return compute(start)
                except RuntimeError as error:
                    if not ran_out_of_memory(error) or self.max_batch == 1:
                        raise
                # Not in the except clause: there the traceback still holds what filled the memory.
                self.max_batch //= 2
                torch.cuda.empty_cache()
                print(f"out of memory: going on with at most {self.max_batch} images at once", flush=True)

        return fitting

    def score(self, target: str, source: Source) -> Score:
        """The target's predictions on the source's images, on noise that no attack has seen."""
        return self._as_score(target, source, self._score_record(target, source).finish()["result"])

    def _score_record(self, target: str, source: Source) -> ChunkedRecord:
        config, size = self.config, self.config.sizes.chunk_size

        def compute(start: int) -> dict[str, Any]:
            x_adv = self._x_adv(source, start)
            labels, model = self.images.y[start : start + size], self.defence(target)
            selecting = self._logits(model, x_adv, SELECT, start).softmax(2)
            reporting = self._logits(model, x_adv, REPORT, start)
            right = (selecting.argmax(2) == labels[:, None]).float().mean(1)
            trust = selecting[torch.arange(len(labels), device=labels.device), :, labels].mean(1)
            return {
                "labels": labels.tolist(),
                "report": reporting.argmax(2).tolist(),
                "average": reporting.mean(1).argmax(1).tolist(),
                "suspicion": (right + trust / 1000).tolist(),
            }

        def combine(parts: list[dict[str, Any]]) -> dict[str, Any]:
            return {key: [value for part in parts for value in part[key]] for key in parts[0]}

        attack_name, attack_settings = self.attack_settings(source)
        settings = {
            "target": self.defence_settings(target),
            "n_draws": config.n_draws,
            "seed": config.seed,
            "attack": attack_settings,
        }
        return self._record(f"score-{target}-on-{attack_name}", settings, compute, combine)

    def _as_score(self, target: str, source: Source, result: dict[str, Any]) -> Score:
        same = source.guidance_weight in (None, self.config.guidance_weight)
        own = source.defence == target and same and source.attack not in ("clean", "noise")
        robust = np.array(self.attack(source)["result"]["robust"], dtype=bool) if own else None
        return Score(
            **{key: np.array(result[key]) for key in ("labels", "report", "average", "suspicion")},
            attack_robust=robust,
        )

    def _logits(self, model: nn.Module, x: Tensor, purpose: int, start: int) -> Tensor:
        """(n, n_draws, K); an image's noise depends on the run's seed and its place only."""
        draws = self.config.n_draws
        if not isinstance(model, Purified):
            with torch.no_grad():
                logits = torch.cat([model(part) for part in x.split(self.max_batch)])
                return logits[:, None].expand(-1, draws, -1)
        seeds = image_seeds(self.config.seed, purpose, range(start, start + len(x)), draws)
        repeated = x.repeat_interleave(draws, dim=0)
        size = together(model, x, self.max_batch)
        with torch.no_grad():
            parts = [
                model(images, seeds=chosen)
                for images, chosen in zip(repeated.split(size), seeds.flatten().split(size), strict=True)
            ]
        return torch.cat(parts).reshape(len(x), draws, -1)

    def attack_settings(self, source: Source, *, by_name: bool = False) -> tuple[str, dict[str, Any]]:
        """A readable name for the record and everything that its numbers depend on.

        by_name: networks and images by their names, not their hashes; so they need not be here.
        """
        config = self.config
        settings: dict[str, Any] = {
            "attack": source.attack,
            "dataset": config.sizes.dataset,
            "split": config.split,
            "n_images": config.n_images,
        }
        rows = config.subset
        if not by_name:
            rows = fingerprint(config.sizes.dataset, config.split, config.subset, config.n_images)
        settings |= {"images": rows} if rows else {}
        if source.attack == "clean":
            return f"{self.classifier_name}-clean", settings
        budget = {name: getattr(config, name) for name in SPENT.get(source.attack, ITERATED)}
        budget |= {name: getattr(source, name) for name in budget if getattr(source, name, None)}
        defence = self.defence_settings(source.defence, by_name=by_name)
        if source.n_steps and source.defence != "none":
            defence["n_steps"] = source.n_steps
        if source.guidance_weight is not None:
            defence["guidance_weight"] = source.guidance_weight
        settings |= {
            "classifier": self.classifier_name,
            "norm": config.norm,
            "eps": config.eps,
            "gradient": source.gradient,
            "seed": config.seed if source.seed is None else source.seed,
            "chunk_size": config.sizes.chunk_size,
            "budget": budget,
            "defence": defence,
        }
        if source.fixed_noise:
            settings["fixed_noise"] = True
        if source.attack in ("square", "standard"):  # older records counted one draw of the clean image more
            settings["counted_by"] = "AutoAttack"
        if self._precision(source) != "float32":
            settings["precision"] = config.precision
        if self._compiles(source.defence, source.gradient):
            settings["compiled"] = True
        if source.start:
            settings["start"] = self.attack_settings(source.start, by_name=by_name)[1]
        name = f"{self.classifier_name}-{config.norm}-{source.attack}-{source.defence}-{source.gradient}"
        return name, settings

    def _precision(self, source: Source) -> str:
        """Of the attack; an undefended classifier has no score network."""
        return "float32" if source.defence == "none" else self.config.precision

    def defence_settings(self, name: str, *, by_name: bool = False) -> dict[str, Any]:
        """What a defence's behaviour depends on: its networks by hash (or name), and its own settings."""
        config, dataset = self.config, self.config.sizes.dataset

        def identity(network: str) -> str:
            return network if by_name else digest(dataset, network)

        settings: dict[str, Any] = {
            "name": name,
            "classifier": self.classifier_name,
            "classifier_sha256": identity(self.classifier_name),
        }
        if name in MAXIMISERS:
            settings |= {"score_sha256": identity(config.sizes.score)}
            settings |= {"n_steps": N_STEPS, "lr": LR, "sigma": SIGMA}
        elif name != "none":
            settings |= {
                "score_sha256": identity(config.sizes.score),
                "t_star": config.t_star,
                "n_steps": config.n_steps,
            }
        if is_guided(name):
            settings["guidance_weight"] = config.guidance_weight
        if name in PURIFIERS and PURIFIERS[name].robust_guide:
            settings["guide_sha256"] = identity(self._guide)
        return settings

    def _is_done(self, source: Source) -> bool:
        return is_complete(record_path(self.config.profile, *self.attack_settings(source)))

    def _job(self, source: Source, targets: dict[str, Sequence[Source]]) -> Job:
        facing = tuple(target for target, row in targets.items() if source in row)
        record = record_path(self.config.profile, *self.attack_settings(source, by_name=True)).stem
        job = Job(self.config, self.classifier_name, source, facing, record)
        return replace(job, done=self._at_hand(job) and self._is_done(source))

    def _at_hand(self, job: Job) -> bool:
        """Whether data and networks are: else no record can be named, and to plan none is fetched."""
        dataset, score = self.config.sizes.dataset, self.config.sizes.score
        return is_here(dataset) and not missing(dataset, job.classifiers, score)

    def _all_right(self) -> Score:
        labels = np.zeros(self.config.n_images, dtype=int)
        draws = np.zeros((self.config.n_images, self.config.n_draws), dtype=int)
        return Score(labels, draws, labels, labels.astype(float), np.ones(len(labels), dtype=bool))

    def _cost(self, source: Source) -> float:
        """About how many score evaluations the attack takes; good enough to foretell the time left."""
        gradients, forwards = calls(source, self.config)
        path = self._path_cost(source.defence, source.n_steps)
        return self.config.n_images * path * (2 * gradients + forwards) + 1

    def _scoring_cost(self, target: str, row: Sequence[Source]) -> float:
        """The same of the target's draws on all of a row's images that are not scored yet."""
        left = sum(not is_complete(self._score_record(target, source).path) for source in row)
        return left * self.config.n_images * 2 * self.config.n_draws * self._path_cost(target)

    def _path_cost(self, defence: str, n_steps: int | None = None) -> float:
        steps = 0.1 if defence == "none" else n_steps or self.config.n_steps
        return float(steps * purifications(defence) * (2 if is_guided(defence) else 1))


def lend(rows: dict[str, dict[str, Source]], names: Sequence[str] = ()) -> dict[str, dict[str, Source]]:
    """What is made against one defence is tried on all: target → name → source, with the other targets' own.

    An attacker is free to try it, and a defence whose gradient finds good images would else be alone in
    facing them. A lent source is called "exact of reverse"; `names` are those to lend, by default all.
    """
    own: dict[str, Source] = {}
    for target, row in rows.items():
        chosen = {name: source for name, source in row.items() if name in (names or row)}
        own |= made_against(target, chosen, target)
    return {
        target: row | {name: source for name, source in own.items() if source not in row.values()}
        for target, row in rows.items()
    }


def made_against(target: str, row: dict[str, Source], label: str) -> dict[str, Source]:
    """Of a row of sources those that attack this target, by the names under which they are lent."""
    return {
        f"{name}{OF}{label}": source
        for name, source in row.items()
        if source.defence == target and source.attack not in ("clean", "noise")
    }


def calls(source: Source, config: Config) -> tuple[int, int]:
    """(gradients, forward passes without one) of a source's defence, per image."""
    spent = SPENT.get(source.attack, ITERATED)
    iterations = (source.n_iter or config.n_iter) if "n_iter" in spent else 1
    gradients = iterations * (source.eot or config.eot) if "eot" in spent else 0
    gradients = config.n_iter * (1 + 2 * config.n_targets) if source.attack == "standard" else gradients
    forwards = config.square_queries if "square_queries" in spent else 0
    return (0, gradients + forwards) if source.gradient == "bpda" else (gradients, forwards)


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether this is a GPU's or the CPU's way of saying so."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


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
