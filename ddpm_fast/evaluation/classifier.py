"""A small convolutional classifier, whose last hidden layer serves as the features of the Frechet distance."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training import ImageData
from ..training.files import load_exactly, read_tensors, write_tensors

FEATURES = 64
SHIPPED = Path(__file__).parent.parent / "checkpoints" / "fashion-mnist-classifier.safetensors"
"""A classifier of Fashion-MNIST; docs/checkpoint.md has its recipe."""


class Classifier(nn.Module):
    """Two convolutions and two linear layers on uint8 images.

    Args:
        channels: of the images.
        size: their height and width, at least 4.
        classes: number of labels.
    """

    def __init__(self, channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.shape = {"channels": channels, "size": list(size), "classes": classes}
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * (size[0] // 4) * (size[1] // 4), FEATURES)
        self.out = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` uint8 -> ``(N, FEATURES)`` float32."""
        x = images.float() / 127.5 - 1.0
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` uint8 -> ``(N, classes)`` logits."""
        return self.out(self.features(images))  # type: ignore[no-any-return]


def train_classifier(data: ImageData, *, epochs: int = 4, batch_size: int = 128, seed: int = 0) -> Classifier:
    """Train a :class:`Classifier` with Adam, the learning rate falling from 2e-3 to 0.

    The initial weights and the order of the images are functions of the seed.

    Raises:
        ValueError: no labels, or nothing to train on.
    """
    images, labels = data
    if labels is None:
        raise ValueError("a classifier needs labels, and this data set has none")
    if epochs < 1 or batch_size < 1 or len(images) == 0:
        raise ValueError(f"need images, epochs and a batch size, got {len(images)}, {epochs} and {batch_size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(images.shape[1], (images.shape[2], images.shape[3]), int(labels.max()) + 1)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        rows for _ in range(epochs) for rows in torch.randperm(len(images), generator=generator).split(batch_size)
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / len(batches))
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def save_classifier(path: str | Path, model: Classifier) -> None:
    """Write a classifier, its weights in float16; an existing file is replaced as a whole or not at all.

    Raises:
        ValueError: a weight that is not finite in float16.
    """
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"weight {name} is not finite in {weight.dtype}")
    write_tensors(path, "classifier", weights, model.shape)


def load_classifier(path: str | Path = SHIPPED) -> Classifier:
    """Read what :func:`save_classifier` wrote, by default the shipped classifier of Fashion-MNIST.

    Returns:
        the classifier, float32, in eval mode, without gradients.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged or truncated, or no classifier of this package.
    """
    weights, shape = read_tensors(path, "classifier")
    try:
        model = Classifier(shape["channels"], tuple(shape["size"]), shape["classes"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: no valid shape of a classifier in the header: {error!r}") from error
    load_exactly(path, model.state_dict(), weights, "weight")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def features_and_probabilities(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features ``(N, FEATURES)`` float64 and class probabilities ``(N, classes)`` float64 of uint8 images."""
    features = torch.cat([model.features(batch) for batch in images.split(500)])
    return features.double(), F.softmax(model.out(features).double(), dim=1)
