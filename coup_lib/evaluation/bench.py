"""The named defences around a profile's networks: built when asked for, and identified by what made them."""

from functools import cache, cached_property
from typing import Any
from weakref import WeakSet

from torch import nn

from coup_lib.checks import choice
from coup_lib.defences import DEFENCES, MAXIMISERS, PURIFIERS, build, is_guided, purifications
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.identity import of_content, of_network
from coup_lib.evaluation.specs import AttackSpec
from coup_lib.gradients import GRADIENTS
from coup_lib.likelihood import LR, N_STEPS, SIGMA
from coup_lib.networks.precision import check_precision
from coup_lib.networks.zoo import check_classifier, load_classifier, load_score
from coup_lib.paths import is_smoke


def against(attack: str, defence: str, gradient: str = "exact", **more: Any) -> AttackSpec:
    """An attack on a named defence; `more` are fields of `AttackSpec`.

    What makes no difference to the defence is left out, so that attacks which are equal are one: without
    guidance there is no second-order term and no λ, without a purifier only one gradient.

    Raises:
        ValueError: for an unknown attack, defence or gradient, or a number out of its range.
    """
    choice("defence", defence, DEFENCES)
    choice("gradient", gradient, GRADIENTS)
    if defence == "none" or (gradient == "first_order" and not is_guided(defence)):
        gradient = "exact"
    if not is_guided(defence):
        more.pop("guidance_weight", None)
    if defence == "none":
        more.pop("n_steps", None)
    return AttackSpec(attack, defence, gradient, **more)


class Bench:
    """The defences of a configuration around one classifier.

    Args:
        classifier: takes the place of the configuration's.
        by_name: identify networks by their names, so that none needs to be here.
    """

    def __init__(self, config: Config, classifier: str | None = None, *, by_name: bool = False) -> None:
        self.config, self.by_name = config, by_name
        self.classifier_name = check_classifier(config.setup.dataset, classifier or config.classifier)
        self._from_zoo: WeakSet[nn.Module] = WeakSet()

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
        """s(x, t) in the precision of attacks; ValueError for one to be lowered that is not the zoo's."""
        precision = self.config.precision
        if precision == "float32":
            return self.score_network
        if self.score_network not in self._from_zoo:
            raise ValueError("score_network: expected the profile's own, to be lowered")
        return self._score_network(precision)

    def precision(self, defence: str) -> str:
        """That of an attack on the defence; an undefended classifier has no score network."""
        return "float32" if defence == "none" else self.config.precision

    def attacked(self, spec: AttackSpec) -> nn.Module:
        """The defence as an attack meets it: its path, gradient, precision and λ.

        Raises:
            ValueError: for a precision that the device has not.
        """
        check_precision(self.precision(spec.surrogate), self.config.torch_device)
        if spec.surrogate == "none":
            return self.classifier
        return self._build(spec.surrogate, self.attacked_network, spec.gradient, **spec.path)

    def defence(self, name: str, gradient: str = "exact") -> nn.Module:
        """The named defence around the classifier, in float32."""
        choice("defence", name, DEFENCES)
        return self.classifier if name == "none" else self._build(name, self.score_network, gradient)

    def _build(self, name: str, score: nn.Module, gradient: str, **own: Any) -> nn.Module:
        """own: the number of steps and λ, where they are not the configuration's."""
        config, recipe = self.config, PURIFIERS[name]
        path = {"n_steps": config.n_steps, "guidance_weight": config.guidance_weight} | own
        guide = self._classifier(self._guide(name)) if recipe.robust_guide else self.classifier
        return build(recipe, self.classifier, score, guide, t_star=config.t_star, gradient=gradient, **path)

    def settings(self, name: str, spec: AttackSpec | None = None) -> dict[str, Any]:
        """What the behaviour of a defence depends on, for the name of its records.

        spec: where it is attacked; with a path or λ of its own, it is another defence.
        """
        config = self.config
        found: dict[str, Any] = {"name": name, "classifier": self.classifier_name}
        found["classifier_sha256"] = self._identity(self.classifier_name)
        if name == "none":
            return found
        found["score_sha256"] = self._identity(config.setup.score)
        if name in MAXIMISERS:
            found |= {"n_steps": N_STEPS, "lr": LR, "sigma": SIGMA}
        else:
            found |= {"t_star": config.t_star, "n_steps": config.n_steps}
        if is_guided(name):
            found["guidance_weight"] = config.guidance_weight
        found |= PURIFIERS[name].constants
        if PURIFIERS[name].robust_guide:
            found["guide_sha256"] = self._identity(self._guide(name))
        return found | (spec.path if spec else {})

    def how_attacked(self, spec: AttackSpec) -> dict[str, Any]:
        """What else an attack's numbers depend on: the arithmetic in the score network, if not float32."""
        precision = self.precision(spec.surrogate)
        return {} if precision == "float32" else {"precision": precision}

    def cost(self, defence: str, n_steps: int) -> float:
        """About how many score evaluations a decision takes."""
        steps = 0.1 if defence == "none" else n_steps
        return float(steps * purifications(defence) * (2 if is_guided(defence) else 1))

    def _identity(self, name: str) -> str:
        """The content of the network in hand, or of the zoo's while none is loaded here."""
        if self.by_name:
            return name
        is_score = name == self.config.setup.score
        attribute = "score_network" if is_score else "classifier"
        in_hand = is_score or name == self.classifier_name
        if type(self) is Bench and not (in_hand and attribute in vars(self)):
            return _identity_in_zoo(self.config.setup.dataset, name, is_score, is_smoke())
        network = getattr(self, attribute) if in_hand else self._classifier(name)
        # Of the zoo's networks the name says what they compute with their weights.
        return of_network(network) if network in self._from_zoo else of_content(network)[0]

    def _guide(self, defence: str) -> str:
        return self.config.setup.robust_classifiers[PURIFIERS[defence].guide_norm(self.config.norm)]

    def _score_network(self, precision: str) -> nn.Module:
        config = self.config
        return self._loaded(load_score(config.setup.dataset, config.setup.score, precision=precision))

    def _classifier(self, name: str) -> nn.Module:
        return self._loaded(load_classifier(self.config.setup.dataset, name))

    def _loaded(self, network: nn.Module) -> nn.Module:
        self._from_zoo.add(network)
        return network.to(self.config.torch_device)


@cache
def _identity_in_zoo(dataset: str, name: str, is_score: bool, _smoke: bool) -> str:
    """The content of a network of the zoo, which is loaded once for it; a smoke run has other networks."""
    return of_network(load_score(dataset, name) if is_score else load_classifier(dataset, name))
