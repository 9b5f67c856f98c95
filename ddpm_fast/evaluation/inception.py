"""The features of the Frechet Inception distance, from torch-fidelity where it is installed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_BATCH = 32


def inception_features(weights: str | Path) -> Callable[[Tensor], Tensor]:
    """A function from uint8 images to the 2048 features of the Inception network that FIDs are computed with.

    Heusel et al. 2017; the network is torch-fidelity's port of the original one. Nothing is downloaded.

    Args:
        weights: the file that torch-fidelity keeps, ``weights-inception-2015-12-05-6726825d.pth``. It is unpickled:
            take it from a source that you trust.

    Returns:
        a function ``(N, C, H, W)`` uint8, C 1 or 3 -> ``(N, 2048)`` float64.

    Raises:
        FileNotFoundError: no such file.
        ImportError: torch-fidelity is not installed.
        ValueError: a file of something else.
    """
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"no Inception weights at {path}: torch-fidelity's are weights-inception-2015-12-05-6726825d.pth, "
            f"from its release v0.2.0"
        )
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(f"Inception features need torch-fidelity: pip install torch-fidelity ({error})") from error
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path), verbose=False
        )
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not the weights of torch-fidelity's Inception network: {error!r}") from error

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1)  # gray is the same in every channel
        return torch.cat([network(batch)[0].double() for batch in colour.split(_BATCH)])

    return features
