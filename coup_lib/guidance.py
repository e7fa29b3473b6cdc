"""Classifier-confidence guidance (Sec. 4.1.2): a wrapper that adds itself to a score."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coup_lib.frozen import frozen_layers


def to_image(state: Tensor) -> Tensor:
    """The SDE's state in [-1, 1] as an image in [0, 1]."""
    return (state + 1) / 2


def to_state(image: Tensor) -> Tensor:
    """An image in [0, 1] as the SDE's state in [-1, 1]."""
    return image * 2 - 1


def log_confidence(classifier: nn.Module, x: Tensor) -> Tensor:
    """log max_y p(y|x), (B,), at the state x (B, C, H, W) in [-1, 1]; the classifier sees it in [0, 1]."""
    return F.log_softmax(classifier(to_image(x)), dim=1).amax(dim=1)


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇ₓ of function, (B, ...) to (B,), at x.

    The result can be differentiated again where x asks for a gradient and gradients are on: that is the
    second-order term of Sec. 4.2.1.
    """
    second_order = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad(), frozen_layers(x) if second_order else nullcontext():
        x = x if second_order else x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x, create_graph=second_order)[0]


class Guided(nn.Module):
    """s(x, t) + λ ∇ₓ log max_y p(y|x): the bracket of Eq. 5.

    Args:
        score: s(x, t).
        classifier: images (B, C, H, W) in [0, 1] → logits (B, K); not conditioned on t.
        weight: λ; 0 gives the score itself, 1 is the paper's choice.
    """

    def __init__(self, score: nn.Module, classifier: nn.Module, weight: float = 1.0) -> None:
        super().__init__()
        self.score, self.classifier, self.weight = score, classifier, weight

    def guidance(self, x: Tensor, t: Tensor) -> Tensor:
        """λ ∇ₓ log max_y p(y|x), like x."""
        return self.weight * gradient_of(lambda x: log_confidence(self.classifier, x), x)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided score at x (B, C, H, W) in [-1, 1] and t of shape () or (B,)."""
        return self.score(x, t) + self.guidance(x, t)


class FirstOrder(nn.Module):
    """A guided score with its guidance held constant under differentiation, as the authors' release does."""

    def __init__(self, guided: Guided) -> None:
        super().__init__()
        self.guided = guided

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As `Guided.forward`."""
        return self.guided.score(x, t) + self.guided.guidance(x.detach(), t)


def first_order(score: nn.Module) -> nn.Module:
    """The score whose derivative leaves the second-order guidance term out; any other score as it is."""
    return FirstOrder(score) if isinstance(score, Guided) else score
