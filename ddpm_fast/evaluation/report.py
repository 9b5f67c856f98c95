"""How good generated images are, measured by a classifier of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import randn
from ..training import ImageData
from .classifier import Classifier, features_and_probabilities, train_classifier
from .frechet import frechet_distance
from .precision_recall import precision_recall

_NEIGHBOURS = 3


@dataclass(frozen=True)
class Scores:
    """What the classifier makes of one set of images.

    Attributes:
        count: images in the set.
        frechet: distance to the training images in the features; less is better.
        precision: the fraction within the training images' manifold.
        recall: the fraction of as many training images within this set's manifold.
        confidence: mean probability of the most likely class.
        entropy: mean entropy of the class probabilities, in nats.
        histogram: fraction of the images in each class.
    """

    count: int
    frechet: float
    precision: float
    recall: float
    confidence: float
    entropy: float
    histogram: list[float]


@dataclass(frozen=True)
class Evaluation:
    """Scores of generated images between the two ends of the scale: real test images and pure noise.

    Attributes:
        accuracy: of the classifier on the test images.
        features: whose the features are.
        samples, test, noise: scores; all three sets have the same number of images.
    """

    accuracy: float
    features: str
    samples: Scores
    test: Scores
    noise: Scores

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            f"{'':<12}{'images':>8}{'Frechet':>11}{'precision':>11}{'recall':>8}{'confidence':>12}{'entropy':>9}"
            "  classes (%)"
        ]
        for name, s in (("real test", self.test), ("samples", self.samples), ("pure noise", self.noise)):
            classes = " ".join(f"{100 * fraction:.0f}" for fraction in s.histogram)
            distances = f"{s.frechet:>11.3f}{s.precision:>11.3f}{s.recall:>8.3f}"
            rows.append(f"{name:<12}{s.count:>8}{distances}{s.confidence:>12.3f}{s.entropy:>9.3f}  {classes}")
        rows.append(
            "Frechet distance, precision and recall beside the training images, in features of "
            f"{self.features}; classifier's test accuracy {100 * self.accuracy:.2f} %"
        )
        return "\n".join(rows)


def evaluate(
    samples: Tensor,
    train: ImageData,
    test: ImageData,
    *,
    seed: int = 0,
    classifier: Classifier | None = None,
    inception: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Compare generated images with real ones.

    Distances, precision (Kynkaanniemi et al. 2019, k = 3) and recall depend on the number of images, so the real test
    images and the noise that stand beside the samples are as many as the samples (or all sets as many as there are test
    images). The Frechet distance is measured to all training images, precision and recall to as many of them.

    Args:
        samples: ``(N, C, H, W)`` uint8, at least 4; see :func:`to_uint8`.
        train: what the classifier learns from and the distances are measured to.
        test: real images held out.
        seed: of the classifier and of the noise.
        classifier: a trained one, to save the minute that training takes.
        inception: from :func:`inception_features`: what the distances are measured in, in place of the classifier's
            features.

    Raises:
        ValueError: wrong shapes or dtypes, fewer than 4 images, or no labels.
    """
    for name, images in (("samples", samples), ("train.images", train.images), ("test.images", test.images)):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != train.images.shape[1:]:
            raise ValueError(
                f"{name} must be uint8 (N, C, H, W) like the training images {tuple(train.images.shape)}, "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        if len(images) <= _NEIGHBOURS:
            raise ValueError(f"{name} must hold at least {_NEIGHBOURS + 1} images, got {len(images)}")
    if test.labels is None:
        raise ValueError("the test images need labels")
    if classifier is None:
        classifier = train_classifier(train, seed=seed)
    count = min(len(samples), len(train.images), len(test.images))
    noise = to_uint8(randn((count, *samples.shape[1:]), seed=seed, stream="x_T"))

    def features_of(images: Tensor) -> Tensor:
        return features_and_probabilities(classifier, images)[0] if inception is None else inception(images)

    reference = features_of(train.images)
    # Spread over the whole set, which may be in the order of its classes.
    some = reference[torch.arange(count) * len(reference) // count]

    def scores(images: Tensor) -> Scores:
        _, probabilities = features_and_probabilities(classifier, images)
        return _scores(features_of(images), probabilities, reference, some)

    _, probabilities = features_and_probabilities(classifier, test.images)
    return Evaluation(
        accuracy=(probabilities.argmax(1) == test.labels).double().mean().item(),
        features="the classifier" if inception is None else "Inception",
        samples=scores(samples[:count]),
        test=scores(test.images[:count]),
        noise=scores(noise),
    )


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes: clamped, then rounded; undone by ``x / 127.5 - 1``."""
    return ((x.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def _scores(features: Tensor, probabilities: Tensor, reference: Tensor, some: Tensor) -> Scores:
    classes = probabilities.shape[1]
    precision, recall = precision_recall(features, some, k=_NEIGHBOURS)
    return Scores(
        count=len(features),
        frechet=frechet_distance(features, reference),
        precision=precision,
        recall=recall,
        confidence=probabilities.amax(1).mean().item(),
        entropy=torch.special.entr(probabilities).sum(1).mean().item(),
        histogram=(probabilities.argmax(1).bincount(minlength=classes).double() / len(features)).tolist(),
    )
