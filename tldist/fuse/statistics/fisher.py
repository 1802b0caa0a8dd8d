"""Diagonal Fisher information: how much a classifier's answers depend on each of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from tldist.bundle import Task
from tldist.data.order import seed_of
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.fuse.statistics.walk import Walk, sum_over, walk_images
from tldist.models.load import input_tensor
from tldist.progress import warn
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger

_MOST_AT_ONCE = 128


def fisher_information(
    model: nn.Module,
    how: Preprocessing,
    domain: Domain,
    team: Team,
    ledger: Ledger,
    *,
    walk: Walk,
    task: Task = "multiclass",
    exact_classes: int = 16,
    gradient_bytes: int = 1 << 30,
) -> dict[str, Tensor]:
    """``F = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2``, eq. 3 and 4 of arXiv:2111.09832.

    Labels are not read. Called by all processes together; the same for any number of them and, but for
    rounding, any batches.

    Args:
        model: on the team's device; put into evaluation mode, else unchanged.
        how: its preprocessing.
        domain: the images.
        team: the processes.
        ledger: takes the broken images.
        walk: which images.
        task: multilabel: the classes are independent of one another given the image.
        exact_classes: the expectation over y is exact for at most so many classes; for more, one y an image
            is drawn from the model's own answer, by the seed and the image's position.
        gradient_bytes: memory for the gradients that are computed at once.

    Returns:
        Name of a parameter to float64 tensor of its shape, on the CPU. All parameters, frozen or not.

    Raises:
        DomainError: too many broken images, or none that can be decoded.
    """
    model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    squares = {
        name: torch.zeros_like(p, dtype=torch.float64, device=team.device) for name, p in parameters.items()
    }
    gradients = _Gradients(model, parameters, gradient_bytes)
    count = torch.zeros(1, dtype=torch.float64)
    for images, positions in walk_images(how, domain, team, ledger, walk, "Fisher information"):
        inputs = input_tensor(images, how)
        with torch.no_grad():
            logits = model(inputs)
        found = directions(logits, task, exact_classes, positions, walk.seed)
        gradients.add_squares(inputs, found.to(logits.dtype), squares)
        count += len(images)
    images_seen = sum_over(team, count)
    information = {name: sum_over(team, square) / images_seen for name, square in squares.items()}
    # One name a tensor so far; where two layers share one, both names get the same.
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: information[first[id(p)]] for name, p in model.named_parameters(remove_duplicate=False)}


def normalised(information: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divided by its length as one vector over all tensors.

    A model that is surer of its answers has less information everywhere, and would have less say in a merge.
    Where all is zero, it stays so.
    """
    length = float(sum(tensor.double().square().sum() for tensor in information.values())) ** 0.5
    return {name: tensor / length if length else tensor for name, tensor in information.items()}


def directions(logits: Tensor, task: Task, exact_classes: int, positions: np.ndarray, seed: int) -> Tensor:
    """Vectors c with ``F = sum_r (d <c_r, logits> / d theta)^2`` for each image.

    As ``d log p(y|x) / d theta = <e_y - p, d logits / d theta>``, the vectors are ``sqrt(p_y) (e_y - p)`` for
    each class y; of independent classes ``sqrt(p_k (1 - p_k)) e_k``, as their errors have mean 0 and are
    uncorrelated; and of drawn labels ``y - p``.

    Args:
        logits: (N, K).
        task, exact_classes, seed: of `fisher_information`.
        positions: (N,), of the images in their domain.

    Returns:
        float64 (N, R, K): R = K, or 1 where labels are drawn.
    """
    logits = logits.detach().double()
    width = logits.shape[1]
    exact = width <= exact_classes
    eye = torch.eye(width, dtype=torch.float64, device=logits.device)
    if task == "multilabel":
        chances = logits.sigmoid()
        if exact:
            return (chances * (-logits).sigmoid()).sqrt()[:, :, None] * eye
        return ((_draws(positions, seed, width).to(logits.device) < chances).double() - chances)[:, None]
    chances = logits.softmax(1)
    if exact:
        return chances.sqrt()[:, :, None] * (eye - chances[:, None])
    drawn = _draws(positions, seed, 1).to(logits.device)
    labels = (chances.cumsum(1) <= drawn).sum(1).clamp(max=width - 1)
    return (eye[labels] - chances)[:, None]


def _draws(positions: np.ndarray, seed: int, width: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 (N, width), the same for an image whatever batch it comes in."""
    rows = [np.random.default_rng(seed_of("fisher", seed, int(p))).random(width) for p in positions]
    return torch.from_numpy(np.stack(rows))


class _Gradients:
    """Gradients of single images, many at once where the model's operations allow it."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor], gradient_bytes: int) -> None:
        self.model, self.parameters = model, parameters
        one = sum(p.numel() * p.element_size() for p in parameters.values())
        self.at_once = min(_MOST_AT_ONCE, max(1, gradient_bytes // max(1, one)))
        self.together = self.at_once > 1

    def add_squares(self, inputs: Tensor, found: Tensor, squares: dict[str, Tensor]) -> None:
        """Add the squared gradients of ``<c, logits>`` for all vectors c of all images.

        Args:
            inputs: (N, 3, H, W).
            found: (N, R, K), of `directions`.
            squares: float64 sums, changed in place.
        """
        rows = torch.arange(len(inputs), device=inputs.device).repeat_interleave(found.shape[1])
        pairs = zip(rows.split(self.at_once), found.flatten(0, 1).split(self.at_once))
        for images, vectors in pairs:
            for name, square in self._squares(inputs[images], vectors):
                squares[name] += square

    def _squares(self, inputs: Tensor, vectors: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and sum of squares, float64, of one or of all pairs; a name may come several times."""
        found = self._at_once(inputs, vectors) if self.together else None
        if found is not None:
            yield from ((name, g.square_().sum(0, dtype=torch.float64)) for name, g in found.items())
            return
        for image, vector in zip(inputs, vectors):
            yield from self._one(image, vector)

    def _at_once(self, inputs: Tensor, vectors: Tensor) -> dict[str, Tensor] | None:
        """The gradients of all pairs, (N, ...) each; None where the model's operations do not allow it."""
        try:
            with warnings.catch_warnings():  # of operations that are done one by one; the answer is the same
                warnings.filterwarnings("ignore", message=".*performance drop")
                found: dict[str, Tensor] = vmap(grad(self._answer), in_dims=(None, 0, 0))(
                    self.parameters, inputs, vectors
                )
        except Exception as error:  # it runs the model's own forward, under rules of its own
            self.together = False
            cause = str(error).strip().split("\n")[0][:120]
            warn(
                f"the gradients of several images cannot be computed at once ({type(error).__name__}: "
                f"{cause}): they are computed one by one, which takes longer"
            )
            return None
        return found

    def _one(self, image: Tensor, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        leaves = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
        found = torch.autograd.grad(
            self._answer(leaves, image, vector), list(leaves.values()), allow_unused=True
        )
        yield from ((name, g.double().square()) for name, g in zip(leaves, found) if g is not None)

    def _answer(self, parameters: dict[str, Tensor], image: Tensor, vector: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.model, parameters, (image[None],))
        return (logits[0] * vector).sum()
