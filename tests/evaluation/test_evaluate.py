"""The evaluation as a whole, on scikit-learn's digits."""

from __future__ import annotations

import json

import pytest
import torch

from ddpm_fast.evaluation import Classifier, evaluate, to_uint8, train_classifier
from ddpm_fast.evaluation.classifier import features_and_probabilities
from ddpm_fast.training import ImageData, load_dataset


@pytest.fixture(scope="module")
def digits() -> tuple[ImageData, ImageData]:
    images, labels = load_dataset("digits")
    assert labels is not None
    return ImageData(images[:1297], labels[:1297]), ImageData(images[1297:], labels[1297:])


@pytest.fixture(scope="module")
def classifier(digits: tuple[ImageData, ImageData]) -> Classifier:
    return train_classifier(digits[0], epochs=12, batch_size=32)


def test_ranks_real_images_before_damaged_ones_before_noise(
    digits: tuple[ImageData, ImageData], classifier: Classifier
) -> None:
    train, test = digits
    report = evaluate(test.images, train, test, classifier=classifier)
    assert report.accuracy > 0.9
    assert report.samples == report.test
    generator = torch.Generator().manual_seed(0)
    damage = torch.randint(0, 130, test.images.shape, generator=generator).to(torch.uint8)
    damaged = evaluate(test.images // 2 + damage, train, test, classifier=classifier)
    assert report.samples.frechet < 0.5 * damaged.samples.frechet < 0.5 * damaged.noise.frechet
    assert damaged.samples.entropy > damaged.test.entropy
    assert damaged.samples.confidence < damaged.test.confidence


def test_reports_are_consistent(digits: tuple[ImageData, ImageData], classifier: Classifier) -> None:
    train, test = digits
    report = evaluate(train.images[:300], train, test, classifier=classifier, seed=3)
    for scores in (report.samples, report.test, report.noise):
        assert scores.count == 300
        assert sum(scores.histogram) == pytest.approx(1.0)
        assert len(scores.histogram) == 10
    features, probabilities = features_and_probabilities(classifier, train.images[:300])
    assert features.shape == (300, 64)
    assert report.samples.confidence == pytest.approx(probabilities.max(1).values.mean().item())
    entropy = -(probabilities * probabilities.clamp(min=1e-300).log()).sum(1).mean().item()
    assert report.samples.entropy == pytest.approx(entropy)
    assert json.loads(json.dumps(report.to_dict()))["accuracy"] == report.accuracy
    assert "real test" in str(report)


def test_seed_decides(digits: tuple[ImageData, ImageData]) -> None:
    train = ImageData(digits[0].images[:200], digits[0].labels[:200])  # type: ignore[index]
    torch.manual_seed(5)
    first = train_classifier(train, epochs=1, seed=1)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    again, other = train_classifier(train, epochs=1, seed=1), train_classifier(train, epochs=1, seed=2)
    assert first.out.weight.equal(again.out.weight)
    assert not first.out.weight.equal(other.out.weight)
    torch.manual_seed(5)
    assert torch.get_rng_state().equal(state)  # the caller's generator is left alone


def test_to_uint8_inverts_the_scaling() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)
    assert to_uint8(bytes_ / 127.5 - 1).equal(bytes_)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_rejects(digits: tuple[ImageData, ImageData], classifier: Classifier) -> None:
    train, test = digits
    with pytest.raises(ValueError, match="samples must be uint8"):
        evaluate(test.images.float(), train, test, classifier=classifier)
    with pytest.raises(ValueError, match="samples must be uint8"):
        evaluate(test.images[..., :4], train, test, classifier=classifier)
    with pytest.raises(ValueError, match="at least 2 images"):
        evaluate(test.images[:1], train, test, classifier=classifier)
    with pytest.raises(ValueError, match="need labels"):
        evaluate(test.images, train, ImageData(test.images, None), classifier=classifier)
    with pytest.raises(ValueError, match="needs labels"):
        train_classifier(ImageData(test.images, None))
    with pytest.raises(ValueError, match="epochs"):
        train_classifier(train, epochs=0)
