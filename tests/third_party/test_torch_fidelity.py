"""torch-fidelity's Inception network and its precision and recall, beside what is ours."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from ddpm_fast.evaluation import inception_features, precision_recall

# torch-fidelity imports torchvision, for data sets and features of other networks, which nothing here uses.
_TORCHVISION = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in _TORCHVISION}):
    from torch_fidelity import feature_extractor_inceptionv3 as original
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    _IMPORTED = {name: module for name, module in sys.modules.items() if name.startswith("torch_fidelity")}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights, as torch-fidelity keeps the trained ones."""
    network = original.FeatureExtractorInceptionV3
    with (
        mock.patch.object(original, "load_state_dict_from_url"),
        mock.patch.object(network, "load_state_dict"),
    ):
        torch.manual_seed(0)
        state = network("inception-v3-compat", ["2048"]).state_dict()
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in _IMPORTED.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_features_are_the_networks(weights, installed):
    generator = torch.Generator().manual_seed(0)
    gray = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8, generator=generator)
    found = inception_features(weights)(gray)
    assert (found.shape, found.dtype) == ((3, 2048), torch.float64)
    network = original.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))
    (expected,) = network(gray.repeat(1, 3, 1, 1))
    assert torch.equal(found, expected.double())
    assert found.std() > 0


def test_other_files_are_no_weights(tmp_path, installed):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not the weights of torch-fidelity's Inception network"):
        inception_features(path)
    torch.save({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not the weights of torch-fidelity's Inception network"):
        inception_features(path)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_agree(k):
    generator = torch.Generator().manual_seed(k)
    generated = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    real = 1.2 * torch.randn(250, 8, generator=generator, dtype=torch.float64) + 0.2
    assert precision_recall(generated, real, k=k) == pytest.approx(
        calculate_precision_recall_full(generated, real, k),
        abs=1e-7,  # a mean in float32
    )
