"""Evaluation: a classifier trained on the real images, and the Frechet distance in its features."""

from __future__ import annotations

from .classifier import Classifier, train_classifier
from .frechet import frechet_distance
from .report import Evaluation, Scores, evaluate, to_uint8

__all__ = ["Classifier", "Evaluation", "Scores", "evaluate", "frechet_distance", "to_uint8", "train_classifier"]
