"""The commands: their options, their help, and what becomes of errors.

Nothing heavy is imported here, so that help and usage errors do not wait for it.
"""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpm_fast.cli.errors import FailedCheck, Interrupted, UserError, one_line

app = typer.Typer(
    name="ddpm-fast",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# click's UsageError; recent releases of typer carry click inside and do not export this class by name.
_UsageError: Any = typer.BadParameter.__base__


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and leaves with its exit status: 0 done, 1 a check failed, 2 wrong usage or input."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Runs a command and returns its exit status."""
    try:
        result = app(args=arguments, prog_name="ddpm-fast", standalone_mode=False)
    except _UsageError as error:
        return _complain(error.format_message().replace("\n", " "), 2)
    except FailedCheck as error:
        return _complain(one_line(error), 1)
    except FloatingPointError as error:  # training that diverged
        return _complain(one_line(error), 1)
    except (UserError, ValueError, OSError, ImportError) as error:
        return _complain(one_line(error), 2)
    except Interrupted as error:
        return _complain(one_line(error), 130)
    except typer.Abort:
        return _complain("interrupted", 130)
    # Ctrl-C becomes this status in recent releases of typer, and Abort in older ones.
    status = result if isinstance(result, int) else 0
    return _complain("interrupted", status) if status == 130 else status


def _complain(message: str, status: int) -> int:
    print(f"ddpm-fast: {message}", file=sys.stderr)
    return status


class Format(str, Enum):
    """What `sample` writes."""

    grid = "grid"
    png = "png"
    npy = "npy"


class Dataset(str, Enum):
    """What `train` and `eval` read."""

    digits = "digits"
    fashion_mnist = "fashion-mnist"
    folder = "folder"


Checkpoint = Annotated[
    Path | None, typer.Option(help="Checkpoint to use.", metavar="FILE", show_default="the shipped one")
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Side of the images in pixels, for a checkpoint that does not say.",
        metavar="N",
        min=1,
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the noise, below 2^64.", metavar="N", min=0, max=2**64 - 1)]
Steps = Annotated[
    str | None,
    typer.Option(
        help="Steps to make: a number, or sections such as 10,10,5, or ddim50 or fast27.",
        metavar="STEPS",
        show_default="all of the schedule",
    ),
]
Solver = Annotated[str, typer.Option(help="ddpm (ancestral) or ddim.", metavar="NAME")]
Eta = Annotated[float, typer.Option(help="Noise of ddim, from 0 (none) to 1 (that of ddpm).", metavar="X")]
Device = Annotated[str, typer.Option(help="cpu or cuda.", metavar="NAME")]
MicroBatch = Annotated[int, typer.Option(help="Samples that the network sees at once.", metavar="N", min=1)]
Threads = Annotated[
    int | None, typer.Option(help="Threads to use.", metavar="N", min=1, show_default="OMP_NUM_THREADS, else all cores")
]


@app.callback(invoke_without_command=True)
def ddpm_fast(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Fused kernels and a drop-in sampler for denoising diffusion models.

    Exit status: 0 done, 1 a check failed, 2 wrong usage or input.

    \b
    Examples:
      ddpm-fast demo                 a plain loop and this package, side by side
      ddpm-fast sample -n 64         64 images from the shipped checkpoint
      ddpm-fast doctor               what is installed, and whether it computes correctly
      ddpm-fast COMMAND --help       options and examples of a command
    """
    if version:
        from ddpm_fast import __version__

        print(f"ddpm-fast {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    n: Annotated[int, typer.Option("-n", "--samples", help="Number of images.", metavar="N", min=1, max=1024)] = 16,
    seed: Seed = 0,
    steps: Steps = None,
    checkpoint: Checkpoint = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.", metavar="DIR")] = Path("demo-output"),
    threads: Threads = None,
) -> None:
    """Draw a grid of images twice from the same noise: with a plain PyTorch loop, and with ddpm_fast.

    Prints the seconds of both, which take turns step by step, and how far apart the images are; writes
    grid.png and denoising.gif.

    Exit status: 0 done, 2 wrong usage or input.

    \b
    Examples:
      ddpm-fast demo
      ddpm-fast demo -n 64 --steps 50 --out pictures
    """
    import torch

    from ddpm_fast.cli.demo import compare, table, write_pictures
    from ddpm_fast.cli.network import open_network

    network = open_network(checkpoint)
    torch.set_num_threads(threads or torch.get_num_threads())
    chosen = _steps(steps)
    made = len(network.schedule if chosen is None else network.schedule.respace(chosen))
    print(
        f"{n} images of {network.path.name}, {made} of {len(network.schedule)} steps, {torch.get_num_threads()} threads"
    )
    result = compare(network, count=n, steps=chosen, seed=seed)
    write_pictures(result, out)
    print(f"\n{table(result)}\n\nwrote {out / 'grid.png'} and {out / 'denoising.gif'}")


@app.command()
def train(
    dataset: Annotated[Dataset, typer.Option(help="What to learn from.")] = Dataset.fashion_mnist,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the IDX files (fashion-mnist) or images (folder).", metavar="DIR", show_default=False
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels, for folder.", metavar="N", min=1, show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.", metavar="DIR")] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", metavar="N", min=1)] = 4000,
    batch_size: Annotated[int, typer.Option(help="Images a step.", metavar="N", min=1)] = 64,
    learning_rate: Annotated[float, typer.Option(help="Largest learning rate; it falls to 0.", metavar="X")] = 2e-3,
    warmup: Annotated[int, typer.Option(help="Steps over which it rises first.", metavar="N", min=0)] = 200,
    ema_decay: Annotated[float, typer.Option(help="Decay of the averaged weights.", metavar="X")] = 0.999,
    schedule: Annotated[str, typer.Option(help="linear, cosine, quadratic, sigmoid.", metavar="NAME")] = "linear",
    timesteps: Annotated[int, typer.Option(help="Steps of the schedule.", metavar="N", min=1)] = 1000,
    prediction: Annotated[str, typer.Option(help="epsilon, x0 or v.", metavar="NAME")] = "epsilon",
    loss: Annotated[
        str, typer.Option(help="mse, l1, huber, kl, rescaled_kl, or hybrid (learned variance).", metavar="NAME")
    ] = "mse",
    variance: Annotated[
        str, typer.Option(help="fixed_small, fixed_large, learned or learned_range.", metavar="NAME")
    ] = "fixed_small",
    weighting: Annotated[
        str | None, typer.Option(help="min_snr, p2 or truncated_snr.", metavar="NAME", show_default="none")
    ] = None,
    timestep_sampler: Annotated[
        str, typer.Option(help="uniform, or loss_second_moment (importance sampling).", metavar="NAME")
    ] = "uniform",
    offset_noise: Annotated[float, typer.Option(help="Deviation of each channel's shared noise.", metavar="X")] = 0.0,
    self_condition: Annotated[
        bool, typer.Option("--self-condition", help="Let the network see its last estimate.")
    ] = False,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16 (autocast).", metavar="NAME")] = "float32",
    conv_mode: Annotated[
        str, typer.Option(help="3x3 convolutions on the CPU: fast, exact, strict or torch.", metavar="NAME")
    ] = "fast",
    accumulate: Annotated[int, typer.Option(help="Parts that a batch is cut into.", metavar="N", min=1)] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute blocks twice, to need less memory.")
    ] = False,
    on_nan: Annotated[str, typer.Option(help="At a loss that is not finite: stop or skip.", metavar="NAME")] = "stop",
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out images of a folder that cannot be read.")
    ] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the images.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", metavar="N", min=0)] = 0,
    base_channels: Annotated[
        int | None, typer.Option(help="Width of the network.", metavar="N", show_default="by data set")
    ] = None,
    channel_mult: Annotated[
        str | None, typer.Option(help="Factors of the levels, such as 1,2,4.", show_default="by data set")
    ] = None,
    dropout: Annotated[float, typer.Option(help="Dropout in the residual blocks.", metavar="X")] = 0.0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.", metavar="N", min=1)] = 500,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Train a network.

    Writes model.safetensors (averaged weights, what the other commands take), state.safetensors (what
    --resume needs) and log.jsonl. A run that was interrupted and resumed ends with the same bits. Under
    torchrun the processes share each batch, of --batch-size images in all. The defaults are the recipe of the
    shipped checkpoint.

    Exit status: 0 done, 1 the loss is not finite, 2 wrong usage or input.

    \b
    Examples:
      ddpm-fast train --dataset digits --steps 2000 --out digits
      ddpm-fast train --dataset fashion-mnist --data /usr/share/datasets/fashion-mnist
      ddpm-fast train --dataset folder --data photos --image-size 32 --flip --steps 100000
      ddpm-fast train --dataset digits --variance learned_range --loss hybrid
      ddpm-fast train --dataset digits --steps 2000 --out digits --resume
      torchrun --nproc-per-node=2 -m ddpm_fast train --dataset digits --batch-size 128 --out digits
    """
    import torch

    from ddpm_fast.cli.network import device_of
    from ddpm_fast.cli.sample import share
    from ddpm_fast.cli.train import configuration
    from ddpm_fast.training import train as run_training
    from ddpm_fast.training.group import process_group

    if dataset != Dataset.digits and data is None:
        raise UserError(f"--dataset {dataset.value} needs --data, the folder that holds its files")
    config = configuration(
        dataset.value,
        {
            "base_channels": base_channels,
            "channel_mult": None if channel_mult is None else _integers("--channel-mult", channel_mult),
            "dropout": dropout,
            "self_condition": self_condition,
        },
        {
            "data_folder": None if data is None else str(data),
            "image_size": image_size,
            "schedule": schedule,
            "timesteps": timesteps,
            "prediction": prediction,
            "loss": loss,
            "variance": variance,
            "weighting": weighting,
            "timestep_sampler": timestep_sampler,
            "offset_noise": offset_noise,
            "steps": steps,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "precision": precision,
            "conv_mode": conv_mode,
            "gradient_checkpointing": gradient_checkpointing,
            "learning_rate": learning_rate,
            "warmup_steps": warmup,
            "ema_decay": ema_decay,
            "flip": flip,
            "seed": seed,
        },
    )
    rank, _ = share(os.environ)
    place = device_of(device)
    torch.set_num_threads(threads or torch.get_num_threads())
    try:
        with process_group(place):
            result = run_training(
                config,
                out,
                resume=resume,
                on_nan=on_nan,
                unreadable="skip" if skip_unreadable else "stop",
                device=place,
                checkpoint_every=checkpoint_every,
                progress=sys.stderr.isatty(),
            )
    except FileExistsError as error:
        raise UserError(f"{out} already holds a run: go on with --resume, or choose another --out") from error
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted: the same command with --resume goes on from {out}'s last checkpoint"
        ) from error
    if rank == 0:
        print(f"wrote {out / 'model.safetensors'} (loss {result.log[-1]['loss']:.4f} over the last steps)")


@app.command()
def sample(
    n: Annotated[int, typer.Option("-n", "--samples", help="Number of samples.", metavar="N", min=1, max=2**32)] = 16,
    seed: Seed = 0,
    steps: Steps = None,
    solver: Solver = "ddpm",
    eta: Eta = 0.0,
    checkpoint: Checkpoint = None,
    image_size: ImageSize = None,
    output: Annotated[
        Format,
        typer.Option(
            "--format", help="npy: float32 shards. png: a file a sample. grid: npy and one picture of them all."
        ),
    ] = Format.grid,
    out: Annotated[Path, typer.Option(help="Folder to write to.", metavar="DIR")] = Path("samples"),
    micro_batch: MicroBatch = 8,
    shard_size: Annotated[
        int | None,
        typer.Option(help="Samples in a file.", metavar="N", min=1, show_default="those of a micro-batch"),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say how long it would take, from a few steps; writes nothing.")
    ] = False,
) -> None:
    """Draw samples from a checkpoint.

    A sample's bits depend on the seed, its number, the solver's settings, the checkpoint and the size of
    the micro-batches, not on how the work is split: run again, the command makes only what is missing, and
    under torchrun the processes share the work. manifest.json in the folder says how the samples were made,
    and their checksums; a damaged file is made again, and a folder with other settings is refused.

    Exit status: 0 done, 2 wrong usage or input.

    \b
    Examples:
      ddpm-fast sample -n 64 --steps 100
      ddpm-fast sample -n 10000 --seed 3 --solver ddim --steps 50 --format npy --out samples10k
      ddpm-fast sample -n 10000 --solver ddim --steps 50 --estimate
      torchrun --nproc-per-node=4 -m ddpm_fast sample -n 50000 --format npy --out fid
    """
    from ddpm_fast.cli.sample import Request, share, write_samples

    rank, world = share(os.environ)
    request = Request(
        checkpoint,
        image_size,
        n,
        seed,
        _steps(steps),
        solver,
        eta,
        micro_batch,
        output=output.value,
        shard_size=shard_size,
        device=device,
    )
    who = f"rank {rank} of {world}: " if world > 1 else ""
    if estimate:
        from ddpm_fast.cli.estimate import estimate as predict

        print(f"{who}{predict(request, out, threads=threads, rank=rank, world=world)}")
        return
    made, found = write_samples(
        request, out, threads=threads, rank=rank, world=world, progress=rank == 0 and sys.stderr.isatty()
    )
    there = f", {found} were there already" if found else ""
    print(f"{who}{out}: {made} shards made{there}")


@app.command(name="eval")
def evaluate(
    dataset: Annotated[Dataset, typer.Option(help="Real images to compare with.")] = Dataset.fashion_mnist,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the IDX files.", metavar="DIR", show_default=False)
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Samples to evaluate instead of drawing some: a folder that sample wrote.", metavar="DIR"),
    ] = None,
    bpd: Annotated[
        bool, typer.Option("--bpd", help="Instead, bound the bits per dimension of -n real test images.")
    ] = False,
    inception: Annotated[
        Path | None,
        typer.Option(
            help="Measure distances in Inception features: torch-fidelity's file of weights.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Number of samples to draw.", metavar="N", min=2)] = 1000,
    seed: Seed = 0,
    steps: Steps = "100",
    solver: Solver = "ddpm",
    eta: Eta = 0.0,
    checkpoint: Checkpoint = None,
    image_size: ImageSize = None,
    micro_batch: MicroBatch = 8,
    threads: Threads = None,
) -> None:
    """Measure samples: Frechet distance, precision and recall, and confidence and entropy in a classifier's eyes.

    The classifier of fashion-mnist is shipped; one of digits is trained first, in seconds. Real test images
    and pure noise stand beside the samples, as the two ends of the scale. Distances, precision and recall
    depend on the number of images: compare equal numbers only. With --inception they are measured in the
    features of Inception, for which torch-fidelity must be installed.

    With --bpd no samples are drawn: the variational bound on the negative log-likelihood of test images is
    evaluated, term by term, for the chain of --steps. Each image costs as many calls of the network as
    there are steps.

    Exit status: 0 done, 2 wrong usage or input.

    \b
    Examples:
      ddpm-fast eval --data /usr/share/datasets/fashion-mnist -n 1000 --steps 100
      ddpm-fast eval --data /usr/share/datasets/fashion-mnist --samples samples10k
      ddpm-fast eval --dataset digits --checkpoint digits/model.safetensors
      ddpm-fast eval --data /usr/share/datasets/fashion-mnist --bpd -n 100 --steps 1000
    """
    import tempfile

    import torch

    from ddpm_fast.cli.evaluate import measure_bound, read_samples, real_images
    from ddpm_fast.cli.network import open_network
    from ddpm_fast.cli.sample import Request, write_samples
    from ddpm_fast.evaluation import evaluate as measure
    from ddpm_fast.evaluation import inception_features, load_classifier, to_uint8

    if dataset == Dataset.fashion_mnist and data is None:
        raise UserError("--dataset fashion-mnist needs --data, the folder that holds its files")
    if n < 4 and not bpd:
        raise UserError(f"precision and recall look at three neighbours of each image: -n must be at least 4, got {n}")
    extractor = None if inception is None else inception_features(inception)
    classifier = load_classifier() if dataset == Dataset.fashion_mnist else None
    real = real_images(dataset.value, data)
    if bpd:
        if samples is not None:
            raise UserError("--bpd measures real test images: leave --samples out")
        torch.set_num_threads(threads or torch.get_num_threads())
        network = open_network(checkpoint, image_size)
        chosen = network.schedule if (kept := _steps(steps)) is None else network.schedule.respace(kept)
        images = real[1].images[:n]
        print(measure_bound(network, chosen, images, seed=seed, batch=micro_batch, progress=sys.stderr.isatty()))
        return
    if samples is not None:
        x = read_samples(samples)
    else:
        request = Request(checkpoint, image_size, n, seed, _steps(steps), solver, eta, micro_batch, output="npy")
        with tempfile.TemporaryDirectory() as folder:
            write_samples(request, Path(folder), threads=threads, progress=sys.stderr.isatty())
            x = read_samples(Path(folder))
    torch.set_num_threads(threads or torch.get_num_threads())
    print(measure(to_uint8(x), *real, seed=seed, classifier=classifier, inception=extractor))


@app.command()
def doctor() -> None:
    """Show what is installed, and test every op on every available backend against float64.

    Exit status: 0 all is well, 1 an op computes something else than it should.

    \b
    Examples:
      ddpm-fast doctor
      DDPM_FAST_CPU_ISA=generic ddpm-fast doctor
    """
    from ddpm_fast.cli.doctor import failures, report, self_test

    results = self_test()
    print(report(results))
    if failed := failures(results):
        raise FailedCheck(f"the self-test failed: {', '.join(failed)}")


def _steps(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else text


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} must be integers separated by commas, got {text!r}") from error
