"""The evaluation as a whole, on scikit-learn's digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddpm_fast.cli.network import SHIPPED
from ddpm_fast.evaluation import (
    Classifier,
    evaluate,
    frechet_distance,
    load_classifier,
    save_classifier,
    to_uint8,
    train_classifier,
)
from ddpm_fast.evaluation import classifier as classifier_module
from ddpm_fast.evaluation.classifier import features_and_probabilities
from ddpm_fast.training import ImageData, load_dataset
from ddpm_fast.training.files import write_tensors


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
    assert report.samples.precision > 0.5 > damaged.samples.precision
    assert report.samples.recall > 0.5 > damaged.samples.recall
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
    # Images that are in the training set lie in its manifold.
    assert report.samples.precision > 0.9


def test_precision_and_recall_are_beside_images_of_all_classes(
    digits: tuple[ImageData, ImageData], classifier: Classifier
) -> None:
    """Training images in the order of their labels, of which one class was drawn."""
    train, test = digits
    assert train.labels is not None
    order = train.labels.argsort()
    ordered = ImageData(train.images[order], train.labels[order])
    scores = evaluate(train.images[train.labels == 0], ordered, test, classifier=classifier).samples
    assert scores.precision > 0.9
    assert scores.recall < 0.2


def test_inception_takes_the_classifiers_place(digits: tuple[ImageData, ImageData], classifier: Classifier) -> None:
    train, test = digits

    def pixels(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double()

    report = evaluate(test.images[:100], train, test, classifier=classifier, inception=pixels)
    assert report.features == "Inception"
    assert report.samples.frechet == frechet_distance(pixels(test.images[:100]), pixels(train.images))
    own = evaluate(test.images[:100], train, test, classifier=classifier)
    assert own.features == "the classifier"
    assert own.samples.confidence == report.samples.confidence


def test_a_classifier_is_saved_and_loaded(tmp_path: Path, classifier: Classifier) -> None:
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, classifier)
    loaded = load_classifier(path)
    for name, weight in classifier.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float())
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_classifier(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds a 'model' checkpoint, 'classifier' is needed"):
        load_classifier(SHIPPED)
    write_tensors(path, "classifier", {}, {"channels": 1})
    with pytest.raises(ValueError, match="no valid shape of a classifier"):
        load_classifier(path)
    damaged = train_classifier(ImageData(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])), epochs=1)
    damaged.out.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"weight out\.weight is not finite in torch\.float16"):
        save_classifier(path, damaged)


def test_the_shipped_classifier() -> None:
    model = load_classifier()
    assert model.shape == {"channels": 1, "size": [28, 28], "classes": 10}
    assert classifier_module.SHIPPED.stat().st_size < 1_000_000


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
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        evaluate(test.images[:3], train, test, classifier=classifier)
    with pytest.raises(ValueError, match="need labels"):
        evaluate(test.images, train, ImageData(test.images, None), classifier=classifier)
    with pytest.raises(ValueError, match="needs labels"):
        train_classifier(ImageData(test.images, None))
    with pytest.raises(ValueError, match="epochs"):
        train_classifier(train, epochs=0)
