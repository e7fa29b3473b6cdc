"""Attacks on defences, and predictions on what the attacks made; on record, and computed where missing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from coup_lib.ascent import told
from coup_lib.attacks import Attack, AttackResult
from coup_lib.data import Images
from coup_lib.evaluation.config import Settings
from coup_lib.evaluation.identity import of_images
from coup_lib.evaluation.noise import ATTACK, DEFENCE, REPORT, SELECT, image_seeds, seed_of
from coup_lib.evaluation.outcomes import Predictions
from coup_lib.evaluation.progress import FORETOLD, Plan, say
from coup_lib.evaluation.records import ChunkedRecord, Worker, is_complete, tell
from coup_lib.evaluation.specs import WITHOUT_MODEL, AttackSpec, Rows
from coup_lib.networks.precision import products
from coup_lib.outside import OUTSIDE
from coup_lib.purify import FixedNoise, Purified, images_per_call
from coup_lib.randomness import begun

T = TypeVar("T")
Values = dict[str, Any]

SMALL = 1e-3  # the cost of an attack that asks no defence: more than that of nothing


class Defences(Protocol):
    """Defences by name, as the engine asks for them: `bench.Bench` has the paper's, an audit has a user's."""

    @property
    def classifier_name(self) -> str:
        """Begins the names of records."""

    def attacked(self, spec: AttackSpec) -> nn.Module:
        """The defence as an attack meets it."""

    def defence(self, name: str) -> nn.Module:
        """The defence itself."""

    def settings(self, name: str, spec: AttackSpec | None = None) -> Values:
        """What the behaviour of a defence depends on; spec: where it is attacked."""

    def how_attacked(self, spec: AttackSpec) -> Values:
        """What else an attack's numbers depend on."""

    def precision(self, defence: str) -> str:
        """That of an attack on the defence."""

    def cost(self, defence: str, n_steps: int) -> float:
        """Of a decision on an image, by a path of so many steps; the unit is the bench's own."""


def attack(
    model: nn.Module,
    images: Images,
    spec: AttackSpec,
    config: Settings,
    *,
    place: int,
    max_batch: int,
    start: Tensor | None = None,
) -> AttackResult:
    """The attack of `spec` on a model, under the threat and with the budget of `config`.

    Args:
        images: to attack.
        place: of the first of them in their split; with the seed it fixes all that is random.
        max_batch: the most images in one call of the model.
        start: like the images, where the attack begins.
    """
    seed = config.seed if spec.seed is None else spec.seed
    if asked_alone(model):  # draws of one gradient are calls of their own
        max_batch = min(max_batch, len(images)) if is_random(model) else 1
    made = Attack(
        spec.attack,
        config.norm,
        config.eps,
        seed=seed_of(seed, ATTACK, place) % 2**31,
        max_batch=images_per_call(model, images.x, max_batch),
        **spec.budget(config),
    )
    if isinstance(model, Purified):
        noise = seed_of(seed, DEFENCE, place)
        model.purifier.reseed(noise)
        model = FixedNoise(model, noise) if spec.fixed_noise else model
        return made(model, images.x, images.y, start)
    with begun(model, images.x.device, seed_of(seed, DEFENCE, place)):
        return made(model, images.x, images.y, start)


def attack_settings(
    spec: AttackSpec, config: Settings, bench: Defences, images: Values
) -> tuple[str, Values]:
    """A readable name for the record of an attack, and everything that its numbers depend on.

    images: what identifies the images under attack.
    """
    name = bench.classifier_name
    settings: Values = {"attack": spec.attack, "n_images": config.n_images, **images}
    if spec.attack == "clean":
        return f"{name}-clean", settings
    norm = "outside" if spec.attack in OUTSIDE else config.norm  # of no ball: in no worst case on record
    settings |= {
        "classifier": name,
        "norm": norm,
        "eps": config.eps,
        "gradient": spec.gradient,
        "seed": config.seed if spec.seed is None else spec.seed,
        "chunk_size": config.chunk_size,
        "budget": spec.budget(config),
        "defence": bench.settings(spec.surrogate, spec),
        **bench.how_attacked(spec),
    }
    if spec.fixed_noise:
        settings["fixed_noise"] = True
    if spec.attack in ("square", "standard"):  # older records counted one draw of the clean image more
        settings["counted_by"] = "AutoAttack"
    if spec.attack == "apgd-dlr":  # older records have no verdict without the clean draw
        settings["judged"] = True
    if spec.start:
        settings["start"] = attack_settings(spec.start, config, bench, images)[1]
    return f"{name}-{norm}-{spec.attack}-{spec.surrogate}-{spec.gradient}", settings


def is_random(model: nn.Module) -> bool:
    """Whether a model that is no `Purified` says by its attribute `random` that each call is another draw."""
    return bool(getattr(model, "random", False))


def asked_alone(model: nn.Module) -> bool:
    """Whether a model says by its attribute `alone` that images of one call share noise, or are mixed up."""
    return bool(getattr(model, "alone", False))


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, seeds: Tensor, max_batch: int) -> Tensor:
    """Logits (n, draws, K) of images x (n, C, H, W), a draw of the defence's noise per seed (n, draws).

    All that a model draws from which is no `Purified` begins at the first image's seeds; one that is to be
    `asked_alone` has a call for each image.
    """
    draws = seeds.shape[1]
    if not isinstance(model, Purified):
        size, many = 1 if asked_alone(model) else max_batch, draws if is_random(model) else 1

        def whole(seed: int) -> Tensor:
            with begun(model, x.device, seed):
                return torch.cat([model(part) for part in x.split(size)])

        found = [whole(seed) for seed in seeds[0, :many].tolist()]
        return torch.stack(found, 1).expand(-1, draws, -1)
    repeated, size = x.repeat_interleave(draws, dim=0), images_per_call(model, x, max_batch)
    parts = zip(repeated.split(size), seeds.flatten().split(size), strict=True)
    return torch.cat([model(images, seeds=chosen) for images, chosen in parts]).reshape(len(x), draws, -1)


@torch.no_grad()
def outcomes_of(
    model: nn.Module, images: Images, config: Settings, *, place: int, max_batch: int
) -> dict[str, list[Any]]:
    """A defence's predictions on images, the first at `place`: the fields of `Predictions` as lists.

    Two sets of draws that no attack has seen: by one a worst case is chosen, by the other it is reported.
    """
    places = range(place, place + len(images))
    selecting, reporting = (
        predict(model, images.x, image_seeds(config.seed, use, places, config.n_draws), max_batch)
        for use in (SELECT, REPORT)
    )
    probabilities = selecting.softmax(2).nan_to_num(0.0)
    right = (classes_of(selecting) == images.y[:, None]).float().mean(1)
    trust = probabilities[torch.arange(len(images), device=images.y.device), :, images.y].mean(1)
    return {
        "labels": images.y.tolist(),
        "report": classes_of(reporting).tolist(),
        "average": classes_of(reporting.mean(1)).tolist(),
        "selection": (right + trust / 1000).tolist(),
    }


def as_predictions(outcomes: Values, counts: Values) -> Predictions:
    """What `outcomes_of` found, as it is on record; counts: the attack's own verdicts, if they count here."""
    kept = {name: np.array(outcomes[name]) for name in ("labels", "report", "average", "selection")}
    given = {"robust", "judged"} & counts.keys()
    verdicts = {f"attack_{name}": np.array(counts[name], dtype=bool) for name in given}
    return Predictions(**kept, **verdicts)


def classes_of(logits: Tensor) -> Tensor:
    """The decisions (...) on logits (..., K); -1, which is no class, where there is NaN among them."""
    return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)


def joined(parts: Sequence[Values]) -> Values:
    """What chunks hold, put together in their order; each warning once."""
    found: Values = {}
    for key, first in parts[0].items():
        values = [part[key] for part in parts]
        whole = np.concatenate(values) if isinstance(first, np.ndarray) else [*chain(*values)]
        found[key] = list(dict.fromkeys(whole)) if key == "warnings" else whole
    return found


class Batch:
    """The most images in one call of a model: halved as long as memory runs out."""

    def __init__(self, most: int) -> None:
        self.most = most

    def fitting(self, compute: Callable[[int], T]) -> Callable[[int], T]:
        """compute, done again with half the batch where it did not fit."""

        def fitted(place: int) -> T:
            while True:
                try:
                    return compute(place)
                except (RuntimeError, MemoryError) as error:
                    if not ran_out_of_memory(error) or self.most == 1:
                        raise
                # Not in the except clause: there the traceback still holds what filled the memory.
                self.most //= 2
                torch.cuda.empty_cache()
                say(f"out of memory: going on with at most {self.most} images at once")

        return fitted


def ran_out_of_memory(error: Exception) -> bool:
    """Whether this is a GPU's or the CPU's way of saying so."""
    said = ("can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
    known = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
    return known or any(text in str(error) for text in said)


@contextmanager
def told_of_all(images: int) -> Iterator[None]:
    """In here an attack that asks its model about so many images says how far its chunk is: 99 % at most.

    How many it asks about is foreseen roughly.
    """
    answered = 0

    def tell_share(more: int) -> None:
        nonlocal answered
        answered += more
        tell(min(answered / max(images, 1), 0.99))

    with told(tell_share):
        yield


class Runner:
    """Runs attacks on the defences of a bench, and scores targets on the images that they made.

    Networks and images are loaded when the first record is missing, not before.

    Args:
        config: threat, budget, draws, seed and chunks.
        bench: builds defences by name, and says what identifies them.
        load_images: gives the images under attack.
        identify_images: gives what identifies them, for the names of records.
        verbose: print progress with an estimate of the time left.
    """

    def __init__(
        self,
        config: Settings,
        bench: Defences,
        load_images: Callable[[], Images],
        identify_images: Callable[[], Values],
        *,
        verbose: bool = True,
    ) -> None:
        self.config, self.bench, self.verbose = config, bench, verbose
        self._load_images, self._identify_images = load_images, identify_images
        self.batch = Batch(config.max_batch)
        self._attacks: dict[Path, Values] = {}
        self._made: dict[Path, np.ndarray] = {}
        self._identified: tuple[Images, str] | None = None

    @cached_property
    def images(self) -> Images:
        """The images under attack, on the configured device."""
        return self._load_images().first(self.config.n_images).to(self.config.torch_device)

    def _images(self) -> Values:
        """What identifies the images in hand, or those that would be loaded."""
        found, images = self._identify_images(), vars(self).get("images")
        if images is None and "images" in found:
            return found
        images = self.images
        if self._identified is None or self._identified[0] is not images:
            self._identified = images, of_images(images)
        return found | {"images": self._identified[1]}

    def predictions(self, rows: Rows, part: str = "") -> dict[str, dict[Any, Predictions]]:
        """Every target on the images of each of its attacks: target → name → score.

        Attacks come first, each once. Finished records are read back. part: what lines of progress begin with
        in place of the classifier's name.
        """
        faced = {target: list(dict.fromkeys(row.values())) for target, row in rows.items()}
        jobs = [(str(spec), [self.attack_record(spec)]) for spec in dict.fromkeys(chain(*faced.values()))]
        for target, row in faced.items():
            records = [self.prediction_record(target, spec) for spec in row]
            jobs.append((f"{target} on images of {len(row)} sources", records))
        left = self.left(rows)
        costs = [sum(left.get(record.path, 0.0) for record in records) for _, records in jobs]
        plan = Plan(costs, verbose=self.verbose, after=_following(left))
        for label, records in jobs:
            plan.start(f"{part or self.bench.classifier_name}: {label}")
            for place, record in enumerate(records, start=1):
                record.share(plan.advance if len(records) == 1 else None)
                plan.advance(place, len(records))
        plan.end()
        found = {
            target: {spec: self.prediction(target, spec) for spec in row} for target, row in faced.items()
        }
        return {
            target: {name: found[target][spec] for name, spec in row.items()} for target, row in rows.items()
        }

    def left(self, rows: Rows) -> dict[Path, float]:
        """Those of `costs` that are yet to be made."""
        return {path: cost for path, cost in self.costs(rows).items() if not is_complete(path)}

    def costs(self, rows: Rows) -> dict[Path, float]:
        """The records that `predictions` takes → about what each of them costs, in the bench's unit."""
        found, how = {}, (self.config, self.bench)
        for target, row in rows.items():
            for spec in row.values():
                found[self.attack_record(spec).path] = attack_cost(spec, *how)
                found[self.prediction_record(target, spec).path] = prediction_cost(target, *how)
        return found

    def attack(self, spec: AttackSpec) -> Values:
        """The record of an attack: AutoAttack's verdicts and warnings under "result"."""
        record = self.attack_record(spec)
        if record.path not in self._attacks:  # every target asks for it again
            self._attacks[record.path] = record.finish()
        return self._attacks[record.path]

    def x_adv(self, spec: AttackSpec) -> Tensor:
        """An attack's images (n, C, H, W), on the configured device; made again where they are not here."""
        record = self.attack_record(spec)
        if record.path not in self._made:  # every target asks for them again
            self._made[record.path] = record.arrays()["x_adv"]
        return torch.from_numpy(self._made[record.path]).to(self.config.torch_device)

    def prediction(self, target: str, spec: AttackSpec) -> Predictions:
        """The target's predictions on an attack's images, on noise that no attack has seen."""
        result = self.prediction_record(target, spec).finish()["result"]
        same_path = self.bench.settings(target) == self.bench.settings(target, spec)
        direct = spec.surrogate == target and same_path and spec.attack not in WITHOUT_MODEL
        return as_predictions(result, self.attack(spec)["result"] if direct else {})

    def attack_settings(self, spec: AttackSpec) -> tuple[str, Values]:
        """A readable name for the record of an attack, and everything that its numbers depend on."""
        return attack_settings(spec, self.config, self.bench, self._images())

    def attack_record(self, spec: AttackSpec) -> ChunkedRecord:
        def compute(place: int) -> Values:
            begin = self._chunk(self.x_adv(spec.start), place) if spec.start else None
            chunk = Images(self._chunk(self.images.x, place), self._chunk(self.images.y, place))
            more: Values = {"place": place, "max_batch": self.batch.most, "start": begin}
            asked = len(chunk) * sum(spec.calls(self.config))
            with products(self.bench.precision(spec.surrogate)), told_of_all(asked):
                result = attack(self.bench.attacked(spec), chunk, spec, self.config, **more)
            found = {"robust": result.robust.int().tolist(), "warnings": list(result.warnings)}
            if result.judged is not None:
                found["judged"] = result.judged.int().tolist()
            return found | {"x_adv": result.x_adv.cpu().numpy()}

        return replace(self.record(*self.attack_settings(spec), compute), apart=True)

    def prediction_record(self, target: str, spec: AttackSpec) -> ChunkedRecord:
        config = self.config

        def compute(place: int) -> Values:
            chunk = Images(self._chunk(self.x_adv(spec), place), self._chunk(self.images.y, place))
            defence = self.bench.defence(target)
            return outcomes_of(defence, chunk, config, place=place, max_batch=self.batch.most)

        attack_name, made_by = self.attack_settings(spec)
        settings: Values = {"target": self.bench.settings(target), "attack": made_by}
        settings |= {"n_draws": config.n_draws, "seed": config.seed}
        return self.record(f"score-{target}-on-{attack_name}", settings, compute)

    def record(self, name: str, settings: Values, compute: Callable[[int], Values]) -> ChunkedRecord:
        """A record over all images; `compute` gets the place of a chunk's first image."""
        config = self.config
        places = range(0, config.n_images, config.chunk_size)
        worker, fitted = Worker(config.shard, config.num_shards), self.batch.fitting(compute)
        return ChunkedRecord(config.profile, name, settings, places, fitted, joined, worker)

    def _chunk(self, values: Tensor, place: int) -> Tensor:
        return values[place : place + self.config.chunk_size]


def attack_cost(spec: AttackSpec, config: Settings, bench: Defences) -> float:
    """About what the attack costs, in the bench's unit; good enough to foretell the time left."""
    gradients, forwards = spec.calls(config)
    call = bench.cost(spec.surrogate, spec.n_steps or config.n_steps)
    return config.n_images * call * (2 * gradients + forwards) + SMALL


def prediction_cost(target: str, config: Settings, bench: Defences) -> float:
    """About what a target's predictions on the images of one attack cost, in the bench's unit."""
    return config.n_images * 2 * config.n_draws * bench.cost(target, config.n_steps)


def _following(left: Mapping[Path, float]) -> float:
    """The cost of what was foretold and is neither made nor among these records."""
    rest = {path: cost for path, cost in FORETOLD.items() if path not in left} if left else {}
    return sum(cost for path, cost in rest.items() if not is_complete(path))
