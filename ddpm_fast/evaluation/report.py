"""How good generated images are, measured by a classifier trained on the real ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import randn
from ..training import ImageData
from .classifier import Classifier, features_and_probabilities, train_classifier
from .frechet import frechet_distance


@dataclass(frozen=True)
class Scores:
    """What the classifier makes of one set of images.

    Attributes:
        count: images in the set.
        frechet: distance to the training images in the classifier's features; less is better.
        confidence: mean probability of the most likely class.
        entropy: mean entropy of the class probabilities, in nats.
        histogram: fraction of the images in each class.
    """

    count: int
    frechet: float
    confidence: float
    entropy: float
    histogram: list[float]


@dataclass(frozen=True)
class Evaluation:
    """Scores of generated images between the two ends of the scale: real test images and pure noise.

    Attributes:
        accuracy: of the classifier on the test images.
        samples, test, noise: scores; all three sets have the same number of images.
    """

    accuracy: float
    samples: Scores
    test: Scores
    noise: Scores

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [f"{'':<12}{'images':>8}{'Frechet':>11}{'confidence':>12}{'entropy':>9}  classes (%)"]
        for name, s in (("real test", self.test), ("samples", self.samples), ("pure noise", self.noise)):
            classes = " ".join(f"{100 * fraction:.0f}" for fraction in s.histogram)
            rows.append(f"{name:<12}{s.count:>8}{s.frechet:>11.3f}{s.confidence:>12.3f}{s.entropy:>9.3f}  {classes}")
        rows.append(f"Frechet distances to the training images; classifier's test accuracy {100 * self.accuracy:.2f} %")
        return "\n".join(rows)


def evaluate(
    samples: Tensor, train: ImageData, test: ImageData, *, seed: int = 0, classifier: Classifier | None = None
) -> Evaluation:
    """Compare generated images with real ones.

    The Frechet distance to the training images depends on the number of images, so the real test images and the noise
    that stand beside the samples are as many as the samples (or all sets as many as there are test images).

    Args:
        samples: ``(N, C, H, W)`` uint8, at least 2; see :func:`to_uint8`.
        train: what the classifier learns from and the distances are measured to.
        test: real images held out.
        seed: of the classifier and of the noise.
        classifier: a trained one, to save the minute that training takes.

    Raises:
        ValueError: wrong shapes or dtypes, fewer than 2 images, or no labels.
    """
    for name, images in (("samples", samples), ("train.images", train.images), ("test.images", test.images)):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != train.images.shape[1:]:
            raise ValueError(
                f"{name} must be uint8 (N, C, H, W) like the training images {tuple(train.images.shape)}, "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        if len(images) < 2:
            raise ValueError(f"{name} must hold at least 2 images, got {len(images)}")
    if test.labels is None:
        raise ValueError("the test images need labels")
    if classifier is None:
        classifier = train_classifier(train, seed=seed)
    count = min(len(samples), len(test.images))
    noise = to_uint8(randn((count, *samples.shape[1:]), seed=seed, stream="x_T"))
    reference, _ = features_and_probabilities(classifier, train.images)
    test_features, test_probabilities = features_and_probabilities(classifier, test.images)
    accuracy = (test_probabilities.argmax(1) == test.labels).double().mean().item()
    return Evaluation(
        accuracy,
        _scores(*features_and_probabilities(classifier, samples[:count]), reference),
        _scores(test_features[:count], test_probabilities[:count], reference),
        _scores(*features_and_probabilities(classifier, noise), reference),
    )


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes: clamped, then rounded; undone by ``x / 127.5 - 1``."""
    return ((x.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def _scores(features: Tensor, probabilities: Tensor, reference: Tensor) -> Scores:
    classes = probabilities.shape[1]
    return Scores(
        count=len(features),
        frechet=frechet_distance(features, reference),
        confidence=probabilities.amax(1).mean().item(),
        entropy=torch.special.entr(probabilities).sum(1).mean().item(),
        histogram=(probabilities.argmax(1).bincount(minlength=classes).double() / len(features)).tolist(),
    )
