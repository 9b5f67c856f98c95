"""Evaluation: Frechet distance, precision and recall in the features of a classifier of the real images."""

from __future__ import annotations

from .classifier import Classifier, load_classifier, save_classifier, train_classifier
from .frechet import frechet_distance
from .inception import inception_features
from .precision_recall import precision_recall
from .report import Evaluation, Scores, evaluate, to_uint8

__all__ = [
    "Classifier",
    "Evaluation",
    "Scores",
    "evaluate",
    "frechet_distance",
    "inception_features",
    "load_classifier",
    "precision_recall",
    "save_classifier",
    "to_uint8",
    "train_classifier",
]
