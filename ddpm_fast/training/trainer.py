"""The training loop: AdamW on the diffusion loss, an averaged copy of the weights, checkpoints to resume from.

Whatever a step draws (order of the data, timesteps, noise, flips, dropout) is a function of the seed and the step's
number, so a run that was interrupted and resumed ends with the weights it would have ended with anyway.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..nn import UNet
from ..ops import randn
from ..schedule import NoiseSchedule
from .checkpoint import save_checkpoint
from .config import TrainConfig
from .datasets import ImageData, load_dataset
from .ema import EMA
from .files import write_atomically
from .loss import diffusion_loss
from .state import read_state, restore_state, save_state

STATE_FILE = "state.safetensors"
MODEL_FILE = "model.safetensors"
LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class TrainResult:
    """A finished run: the averaged network in eval mode, its schedule, and the log's rows."""

    model: UNet
    schedule: NoiseSchedule
    log: list[dict[str, float]]


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    data: ImageData | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    log_every: int = 50,
    checkpoint_every: int = 500,
    progress: bool = False,
    callback: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Train a U-Net; write ``model.safetensors`` (averaged weights), ``state.safetensors`` and ``log.jsonl``.

    Args:
        config: the run's settings.
        output: folder for the files, made if missing.
        data: images (and labels for a network with classes) to train on; by default those that the config names.
        resume: go on from ``state.safetensors`` in `output`, or start where there is none. The config must be
            the same, save for `data_folder`; `log_every` and `checkpoint_every` may change.
        device: where to train.
        log_every: steps averaged in one row of the log: step, loss, learning rate, gradient norm, seconds so far.
        checkpoint_every: steps between checkpoints; the last step always writes one.
        progress: show a progress bar.
        callback: called as ``callback(step, loss)`` after every step and its checkpoint, step counted from 1.

    Raises:
        FileExistsError: `output` holds a run and `resume` is False.
        FloatingPointError: the loss is not finite.
        ValueError: data that does not fit the config, or a state of another run.
    """
    for name, value in (("log_every", log_every), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    folder = Path(output)
    state_path = folder / STATE_FILE
    if state_path.exists() and not resume:
        raise FileExistsError(f"{folder} already holds a run: resume it, or choose another folder")
    if data is None:
        data = load_dataset(
            config.dataset, config.data_folder, image_size=config.image_size, channels=config.unet.in_channels
        )
    _check_data(config, data)
    run = _Run(config, data, torch.device(device))
    if state_path.exists():
        run.restore(state_path)
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows_until(folder / LOG_FILE, run.step)

    bar = tqdm(total=config.steps, initial=run.step, disable=not progress, unit="step")
    with bar, open(folder / LOG_FILE, "a") as log:
        while run.step < config.steps:
            loss = run.advance()
            if run.interval_steps >= log_every or run.step == config.steps:
                rows.append(run.close_interval())
                log.write(json.dumps(rows[-1]) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{rows[-1]['loss']:.4f}", refresh=False)
            if run.step % checkpoint_every == 0 or run.step == config.steps:
                run.save(folder)
            bar.update()
            if callback is not None:
                callback(run.step, loss)
    return TrainResult(run.ema.model, run.schedule, rows)


class _Run:
    """Everything that changes from step to step, and the step itself."""

    def __init__(self, config: TrainConfig, data: ImageData, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.images = data.images
        self.labels = data.labels if config.unet.num_classes is not None else None
        self.schedule = NoiseSchedule.named(config.schedule, config.timesteps)
        with _seeded(config.seed, device):
            self.model = UNet(config.unet).to(device)
        self.ema = EMA(self.model, config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.fingerprint = {"images": len(self.images), "crc32": zlib.crc32(self.images.numpy().tobytes())}
        self.step = 0
        self.seconds = 0.0
        self.interval_steps = 0
        self.interval_loss = 0.0
        self.interval_norm = 0.0
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def advance(self) -> float:
        """Take one optimiser step; return its loss."""
        started = time.perf_counter()
        config, step = self.config, self.step
        rows = self._rows(step)
        images = self.images[rows]
        if config.flip:
            mirrored = randn((len(rows), 1), seed=config.seed, step=step, stream="augmentation")[:, 0] < 0
            images[mirrored] = images[mirrored].flip(-1)
        labels = None if self.labels is None else self.labels[rows].to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        # Dropout is the only layer that draws from torch's own generator.
        dropout = _seeded(_mix(config.seed, step), self.device) if config.unet.dropout > 0 else nullcontext()
        with dropout:
            loss = diffusion_loss(
                self.model,
                self.schedule,
                images.to(self.device),
                loss=config.loss,
                prediction=config.prediction,
                seed=config.seed,
                step=step,
                model_kwargs=None if labels is None else {"y": labels},
            ).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        value = loss.item()
        if not torch.isfinite(norm) or value != value:
            raise FloatingPointError(f"step {step}: loss {value}, gradient norm {norm.item()}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, step)
        self.step = step + 1
        self.interval_steps += 1
        self.interval_loss += value
        self.interval_norm += norm.item()
        self.seconds += time.perf_counter() - started
        return value

    def close_interval(self) -> dict[str, float]:
        """The log's row for the steps since the last one."""
        count = self.interval_steps
        row = {
            "step": self.step,
            "loss": self.interval_loss / count,
            "gradient_norm": self.interval_norm / count,
            "learning_rate": self.config.learning_rate_at(self.step - 1),
            "seconds": round(self.seconds, 2),
        }
        self.interval_steps, self.interval_loss, self.interval_norm = 0, 0.0, 0.0
        return row

    def save(self, folder: Path) -> None:
        """Write both checkpoints."""
        header = {
            "config": _recorded(self.config),
            "data": self.fingerprint,
            "step": self.step,
            "seconds": self.seconds,
            "interval": [self.interval_steps, self.interval_loss, self.interval_norm],
        }
        save_state(folder / STATE_FILE, self.model, self.ema.model, self.optimizer, header)
        metadata = {
            "prediction": self.config.prediction,
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "training": _recorded(self.config),
        }
        save_checkpoint(folder / MODEL_FILE, self.ema.model, self.schedule, metadata=metadata)

    def restore(self, path: Path) -> None:
        """Go back to a saved state. Raises ValueError where it belongs to another run."""
        tensors, header = read_state(path)
        _check_same(path, "config", header["config"], _recorded(self.config))
        _check_same(path, "data", header["data"], self.fingerprint)
        restore_state(path, tensors, self.model, self.ema.model, self.optimizer)
        self.step, self.seconds = header["step"], header["seconds"]
        self.interval_steps, self.interval_loss, self.interval_norm = header["interval"]

    def _rows(self, step: int) -> Tensor:
        """Which images a step sees: the next of this epoch's permutation; the rest that fills no batch is left out."""
        size = self.config.batch_size
        epoch, position = divmod(step, len(self.images) // size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mix(self.config.seed, epoch))
            self._order, self._epoch = torch.randperm(len(self.images), generator=generator), epoch
        return self._order[position * size : (position + 1) * size]


def _recorded(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint says about its run: all but the place of the data, which differs from machine to machine."""
    return {name: value for name, value in config.to_dict().items() if name != "data_folder"}


def _check_data(config: TrainConfig, data: ImageData) -> None:
    images, labels = data
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != config.unet.in_channels:
        raise ValueError(
            f"the images must be uint8 of shape (N, {config.unet.in_channels}, H, W), "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    if len(images) < config.batch_size:
        raise ValueError(f"batch_size {config.batch_size} exceeds the {len(images)} images")
    multiple = config.unet.size_multiple
    if images.shape[2] % multiple or images.shape[3] % multiple:
        raise ValueError(
            f"the images are {images.shape[2]}x{images.shape[3]}, the network's levels need multiples of {multiple}"
        )
    if config.unet.num_classes is not None:
        if labels is None:
            raise ValueError("the network has num_classes, but the data set has no labels")
        if labels.shape != (len(images),) or labels.min() < 0 or labels.max() >= config.unet.num_classes:
            raise ValueError(f"the labels must be one an image, in [0, {config.unet.num_classes})")


def _check_same(path: Path, what: str, stored: dict[str, Any], given: dict[str, Any]) -> None:
    changed = [key for key in sorted(stored.keys() | given.keys()) if stored.get(key) != given.get(key)]
    if changed:
        details = ", ".join(f"{key}: {stored.get(key)!r} there, {given.get(key)!r} now" for key in changed)
        raise ValueError(f"{path} belongs to a run with another {what}: {details}")


def _rows_until(path: Path, step: int) -> list[dict[str, float]]:
    """The log's rows up to a step; what a run wrote after its last checkpoint is cut off, it comes again."""
    if not path.exists():
        return []
    rows: list[dict[str, float]] = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that an interruption cut short
        if row["step"] <= step:
            rows.append(row)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text))
    return rows


def _mix(seed: int, number: int) -> int:
    """A seed for torch's generators from two integers."""
    return (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**63


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators seeded inside, and outside as they were."""
    with torch.random.fork_rng(devices=[device] if device.type != "cpu" else [], device_type=device.type):
        torch.manual_seed(seed)
        yield
