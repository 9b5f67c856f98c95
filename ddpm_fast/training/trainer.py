"""The training loop: AdamW on the diffusion loss, an averaged copy of the weights, checkpoints to resume from.

Whatever a step draws (order of the data, timesteps, noise, flips, dropout) is a function of the seed and the step's
number, so a run that was interrupted and resumed ends with the weights it would have ended with anyway. Several
processes share each batch; what is drawn for an image depends on its place in the whole batch, and so not on how many
there are.
"""

from __future__ import annotations

import json
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._memory import kept_memory
from ..nn import UNet
from ..ops import randn
from ..schedule import NoiseSchedule
from .checkpoint import save_checkpoint
from .config import TrainConfig
from .datasets import ImageData, load_dataset
from .ema import averaged_model
from .files import write_atomically
from .group import Group
from .loss import diffusion_loss
from .state import read_state, restore_state, save_state, start_moments
from .timesteps import TIMESTEP_SAMPLERS

STATE_FILE = "state.safetensors"
MODEL_FILE = "model.safetensors"
LOG_FILE = "log.jsonl"
ON_NAN = ("stop", "skip")
_NAMED = 8  # images that a message lists


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
    on_nan: str = "stop",
    unreadable: str = "stop",
    device: torch.device | str = "cpu",
    log_every: int = 50,
    checkpoint_every: int = 500,
    progress: bool = False,
    callback: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Train a U-Net; write ``model.safetensors`` (averaged weights), ``state.safetensors`` and ``log.jsonl``.

    Where torch.distributed's default process group is initialised, its processes train one network: each calls this
    function with the same arguments and takes its part of every batch, DistributedDataParallel averages the gradients,
    and rank 0 writes the files, into a folder that all of them see. Timesteps, noise and flips are those of one
    process; dropout differs with the number of processes, and the sums of gradients are rounded differently.

    Args:
        config: the run's settings.
        output: folder for the files, made if missing.
        data: images (and labels for a network with classes) to train on; by default those that the config names.
        resume: go on from ``state.safetensors`` in `output`, or start where there is none. The config must be
            the same, save for `data_folder`; the other arguments may change.
        on_nan: what to do where the loss or its gradient is not finite: "stop", with a checkpoint from before the step,
            or "skip" the step with a warning; either names the step, the timesteps and the images.
        unreadable: as for :func:`load_dataset`.
        device: where to train.
        log_every: steps averaged in one row of the log: step, loss, learning rate, gradient norm, seconds so far, and
            how many were skipped.
        checkpoint_every: steps between checkpoints; the last step always writes one.
        progress: show a progress bar.
        callback: called as ``callback(step, loss)`` after every step and its checkpoint, step counted from 1.

    Raises:
        FileExistsError: `output` holds a run and `resume` is False.
        FloatingPointError: the loss is not finite and `on_nan` is "stop", or all steps of an interval were skipped.
        OSError: a checkpoint or the log cannot be written, as on a full disk: the last checkpoint stays as it was.
        ValueError: data that does not fit the config, a state of another run, or fewer images in a part of a batch than
            there are processes.
    """
    if on_nan not in ON_NAN:
        raise ValueError(f"on_nan must be one of {ON_NAN}, got {on_nan!r}")
    for name, value in (("log_every", log_every), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    folder = Path(output)
    state_path = folder / STATE_FILE
    if state_path.exists() and not resume:
        raise FileExistsError(f"{folder} already holds a run: resume it, or choose another folder")
    if data is None:
        data = load_dataset(
            config.dataset,
            config.data_folder,
            image_size=config.image_size,
            channels=config.unet.in_channels,
            unreadable=unreadable,
        )
    _check_data(config, data)
    run = _Run(config, data, torch.device(device))
    if state_path.exists():
        run.restore(state_path)
    run.group.agree("step", run.step)
    writes = run.group.rank == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    rows = _rows_until(folder / LOG_FILE, run.step, cut=writes)

    bar = tqdm(total=config.steps, initial=run.step, disable=not progress or not writes, unit="step")
    with bar, kept_memory():
        while run.step < config.steps:
            closed = False
            try:
                loss = run.advance(skip=on_nan == "skip")
                if run.interval_steps + run.skipped >= log_every or run.step == config.steps:
                    rows.append(run.close_interval())
                    closed = True
            except FloatingPointError:
                if writes:
                    run.save(folder)
                run.group.wait()
                raise
            if closed:
                if writes:
                    run.write_row(folder / LOG_FILE, rows[-1])
                bar.set_postfix(loss=f"{rows[-1]['loss']:.4f}", refresh=False)
            if writes and (run.step % checkpoint_every == 0 or run.step == config.steps):
                run.save(folder)
            bar.update()
            if callback is not None:
                callback(run.step, loss)
    return TrainResult(run.average.module, run.schedule, rows)  # type: ignore[arg-type]


class _Run:
    """Everything that changes from step to step, and the step itself."""

    def __init__(self, config: TrainConfig, data: ImageData, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.group = Group(device)
        if config.batch_size // config.accumulate < self.group.size:
            raise ValueError(
                f"{self.group.size} processes share parts of {config.batch_size // config.accumulate} images "
                f"(batch_size / accumulate): each needs at least one"
            )
        self.images = data.images
        self.labels = data.labels if config.unet.num_classes is not None else None
        self.schedule = NoiseSchedule.named(config.schedule, config.timesteps)
        with _seeded(config.seed, device):
            self.model = UNet(config.unet).to(device)
        self.model.set_gradient_checkpointing(config.gradient_checkpointing)
        self.network = self.group.wrap(self.model)
        self.average = averaged_model(self.model, config.ema_decay)
        self.model.set_conv_mode(config.conv_mode)  # the average keeps its own
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        start_moments(self.model, self.optimizer)
        self.timestep_sampler = TIMESTEP_SAMPLERS[config.timestep_sampler](config.timesteps)
        self.fingerprint = {"images": len(self.images), "crc32": zlib.crc32(self.images.numpy().tobytes())}
        self.step = 0
        self.seconds = 0.0
        self.interval_steps = 0
        self.interval_loss = 0.0
        self.interval_norm = 0.0
        self.skipped = 0
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)
        if self.group.size > 1:
            self._settle()

    def _settle(self) -> None:
        """A backward pass whose gradients are thrown away.

        After its first one DistributedDataParallel sorts the gradients anew into buckets, and three or more processes
        sum them in another order from then on. So a run that is resumed has its first one behind it, too.
        """
        labels = {} if self.labels is None else {"y": self.labels[:1].to(self.device)}
        with _seeded(0, self.device):
            x = torch.zeros_like(self.images[:1], dtype=torch.float32, device=self.device)
            self.network(x, torch.zeros(1, dtype=torch.int64, device=self.device), **labels).sum().backward()
        self.optimizer.zero_grad()

    def advance(self, skip: bool = False) -> float:
        """Take one optimiser step; return its loss.

        Raises:
            FloatingPointError: the loss or its gradient is not finite; with `skip` that is a warning, and the weights
                stay as they were.
        """
        started = time.perf_counter()
        config, step = self.config, self.step
        rows = self._rows(step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        t, weights = self.timestep_sampler.sample(len(rows), seed=config.seed, step=step)
        losses = self._backward(rows, t, weights)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        value = (losses * weights).mean().item()
        problem = _problem(step, losses, norm, t, rows)
        if problem is not None and not skip:
            raise FloatingPointError(problem)
        if problem is None:
            self.optimizer.step()
            self.average.update_parameters(self.model)
            self.timestep_sampler.update(t, losses)
            self.interval_steps += 1
            self.interval_loss += value
            self.interval_norm += norm.item()
        else:
            warnings.warn(f"{problem}; the step is skipped", RuntimeWarning, stacklevel=2)
            self.skipped += 1
        self.optimizer.zero_grad()
        self.step = step + 1
        self.seconds += time.perf_counter() - started
        return value

    def _backward(self, rows: Tensor, t: Tensor, weights: Tensor) -> Tensor:
        """Add the gradient of the batch's weighted mean loss to the parameters'; its losses ``(N,)``, on the CPU."""
        config, step = self.config, self.step
        images = self.images[rows]
        if config.flip:
            mirrored = randn((len(rows), 1), seed=config.seed, step=step, stream="augmentation")[:, 0] < 0
            images[mirrored] = images[mirrored].flip(-1)
        losses = torch.zeros(len(rows))
        size = len(rows) // config.accumulate
        for part in range(0, len(rows), size):
            places = self.group.share(range(part, part + size))
            at = slice(places.start, places.stop)
            labels = None if self.labels is None else self.labels[rows[at]].to(self.device)
            last = part + size == len(rows)
            with ExitStack() as contexts:
                if not last:
                    contexts.enter_context(self.group.local(self.network))
                if config.unet.dropout > 0:  # the only layer that draws from torch's own generator
                    contexts.enter_context(_seeded(_mix(config.seed, step) + places.start, self.device))
                if config.precision == "bfloat16":
                    contexts.enter_context(torch.autocast(self.device.type, torch.bfloat16))
                part_losses = diffusion_loss(
                    self.network,
                    self.schedule,
                    images[at].to(self.device),
                    t[at].to(self.device),
                    loss=config.loss,
                    prediction=config.prediction,
                    variance=config.variance,
                    weighting=config.weighting,
                    offset_noise=config.offset_noise,
                    self_condition=config.unet.self_condition,
                    seed=config.seed,
                    sample_ids=places,
                    step=step,
                    model_kwargs=None if labels is None else {"y": labels},
                )
            # Times their number, for the gradients are averaged over the processes.
            (part_losses * weights[at].to(self.device)).sum().div(len(rows) / self.group.size).backward()
            losses[at] = part_losses.detach().cpu()
        return self.group.sum(losses)

    def close_interval(self) -> dict[str, float]:
        """The log's row for the steps since the last one.

        Raises:
            FloatingPointError: all of them were skipped.
        """
        count = self.interval_steps
        if count == 0:
            raise FloatingPointError(f"step {self.step - 1}: the last {self.skipped} steps were all skipped")
        row = {
            "step": self.step,
            "loss": self.interval_loss / count,
            "gradient_norm": self.interval_norm / count,
            "learning_rate": self.config.learning_rate_at(self.step - 1),
            "seconds": round(self.seconds, 2),
            "skipped": self.skipped,
        }
        self.interval_steps, self.interval_loss, self.interval_norm, self.skipped = 0, 0.0, 0.0, 0
        return row

    def write_row(self, path: Path, row: dict[str, float]) -> None:
        """Add a row to the log; raises OSError where it cannot be written."""
        try:
            with open(path, "a") as log:
                log.write(json.dumps(row) + "\n")
        except OSError as error:
            raise self._unwritten("the log could not be written", path.parent, error) from error

    def save(self, folder: Path) -> None:
        """Write both checkpoints; raises OSError where they cannot be written, and leaves the last ones as they are."""
        metadata = {
            "prediction": self.config.prediction,
            "variance": self.config.variance,
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "training": _recorded(self.config),
        }
        header = {
            "config": _recorded(self.config),
            "data": self.fingerprint,
            "step": self.step,
            "averaged": int(self.average.n_averaged),
            "seconds": self.seconds,
            "interval": [self.interval_steps, self.interval_loss, self.interval_norm, self.skipped],
        }
        average: UNet = self.average.module  # type: ignore[assignment]
        try:
            # The state last: what was killed in between makes the model again.
            save_checkpoint(folder / MODEL_FILE, average, self.schedule, metadata=metadata)
            save_state(folder / STATE_FILE, self.model, average, self.optimizer, self._others(), header)
        except OSError as error:
            raise self._unwritten("no checkpoint could be written", folder, error) from error

    def _unwritten(self, what: str, folder: Path, error: OSError) -> OSError:
        return OSError(
            f"step {self.step}: {what} ({error}); the last checkpoint in {folder} is whole: resume from it when there "
            f"is room"
        )

    def restore(self, path: Path) -> None:
        """Go back to a saved state. Raises ValueError where it belongs to another run."""
        tensors, header = read_state(path)
        # Fields that an older version did not have count as their defaults.
        stored = _recorded(TrainConfig.from_dict(header["config"]))
        _check_same(path, "config", stored, _recorded(self.config))
        _check_same(path, "data", header["data"], self.fingerprint)
        restore_state(path, tensors, self.model, self.average.module, self.optimizer, self._others())
        self.step, self.seconds = header["step"], header["seconds"]
        self.average.n_averaged.fill_(header.get("averaged", self.step + 1))
        self.interval_steps, self.interval_loss, self.interval_norm, *skipped = header["interval"]
        self.skipped = sum(skipped)

    def _others(self) -> dict[str, Tensor]:
        """What else changes from step to step, to be saved and loaded into."""
        return {f"timesteps.{name}": tensor for name, tensor in self.timestep_sampler.state().items()}

    def _rows(self, step: int) -> Tensor:
        """Which images a step sees: the next of this epoch's permutation; the rest that fills no batch is left out."""
        size = self.config.batch_size
        epoch, position = divmod(step, len(self.images) // size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mix(self.config.seed, epoch))
            self._order, self._epoch = torch.randperm(len(self.images), generator=generator), epoch
        return self._order[position * size : (position + 1) * size]


def _problem(step: int, losses: Tensor, norm: Tensor, t: Tensor, rows: Tensor) -> str | None:
    """What is not finite in a step, and where: images are counted as the data set has them."""
    bad = ~torch.isfinite(losses)
    if bad.any():
        where = ", ".join(
            f"{i} (image {rows[i]}, timestep {t[i]}): {losses[i]:g}" for i in bad.nonzero()[:, 0].tolist()[:_NAMED]
        )
        more = int(bad.sum()) - _NAMED
        return f"step {step}: the loss is not finite at batch index {where}" + (f" and {more} more" if more > 0 else "")
    if torch.isfinite(norm):
        return None
    worst = int(losses.argmax())
    return (
        f"step {step}: the gradient's norm is {norm.item():g}; the losses are finite, the largest {losses[worst]:g} at "
        f"batch index {worst} (image {rows[worst]}, timestep {t[worst]})"
    )


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


def _rows_until(path: Path, step: int, *, cut: bool) -> list[dict[str, float]]:
    """The log's rows up to a step; what a run wrote after its last checkpoint is cut off the file: it comes again."""
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
    if cut:
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
