"""Noise schedules: the tables of a discrete diffusion process, in float64.

Notation of Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models" (2020): beta_t is the variance
added at step t, alpha_t = 1 - beta_t, and abar_t is the product of alpha_0 .. alpha_t. Index 0 is the
cleanest step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["NoiseSchedule", "kept_steps"]

_Array = npt.NDArray[np.float64]
_SPACINGS = ("leading", "trailing", "linspace")


class NoiseSchedule:
    """A discrete noise schedule of T steps and every table that follows from its betas.

    All tables are float64 CPU tensors of shape ``(T,)``, computed from the betas alone. A schedule never
    changes: each access to a table returns a copy, which the caller may write into.

    Make one with :meth:`linear`, :meth:`cosine`, :meth:`quadratic`, :meth:`sigmoid`, :meth:`scaled_linear`,
    :meth:`from_betas`, :meth:`from_tables`, :meth:`log_snr` or :meth:`named`, and derive others with
    :meth:`respace`, :meth:`karras` and :meth:`rescale_zero_terminal_snr`. Two schedules are equal when their
    betas, their numbering and the tables given for them are.
    """

    __slots__ = (
        "_betas",
        "_device_tables",
        "_imported",
        "_label",
        "_network_times",
        "_original_timesteps",
        "_tables",
        "_timestep_map",
    )

    _betas: _Array
    _device_tables: dict[torch.device, Tensor]
    _imported: dict[str, _Array]
    _label: str
    _network_times: tuple[float, ...]
    _original_timesteps: int
    _tables: dict[str, _Array]
    _timestep_map: tuple[int, ...]

    def __init__(self) -> None:
        raise TypeError(
            "NoiseSchedule has no constructor: use NoiseSchedule.linear(1000), .cosine(1000), "
            ".from_betas(betas) or another of its class methods"
        )

    # ------------------------------------------------------------------ construction

    @classmethod
    def _build(
        cls,
        betas: _Array,
        label: str,
        timestep_map: Sequence[int] | None = None,
        original_timesteps: int | None = None,
        imported: dict[str, _Array] | None = None,
        network_times: Sequence[float] = (),
    ) -> NoiseSchedule:
        _check_betas(betas, label)
        self = object.__new__(cls)
        set_once = object.__setattr__
        set_once(self, "_betas", betas)
        set_once(self, "_label", label)
        set_once(self, "_timestep_map", tuple(range(len(betas)) if timestep_map is None else timestep_map))
        set_once(self, "_original_timesteps", original_timesteps or len(betas))
        set_once(self, "_imported", imported or {})
        set_once(self, "_network_times", tuple(network_times))
        set_once(self, "_tables", {**_tables(betas), **(imported or {})})
        set_once(self, "_device_tables", {})
        return self

    @classmethod
    def linear(cls, timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Betas evenly spaced from `beta_start` to `beta_end` (Ho et al. 2020, section 4).

        The endpoints are taken as given for every T. The variant that keeps the total noise of 1000 steps is
        ``linear(T, 0.1 / T, 20 / T)``; it has no valid betas for T <= 20, which is an error here.

        Raises:
            TypeError: `timesteps` is no int, or an endpoint no real number.
            ValueError: T < 1, ``beta_start > beta_end``, or a beta outside (0, 1).
        """
        count = _check_count(timesteps)
        start, end = _check_endpoints(beta_start, beta_end)
        return cls._build(np.linspace(start, end, count, dtype=np.float64), "linear")

    @classmethod
    def quadratic(cls, timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Squares of evenly spaced square roots (as in the annotated DDPM article).

        Raises: as :meth:`linear`.
        """
        return cls._build(_squared_linspace(timesteps, beta_start, beta_end), "quadratic")

    @classmethod
    def scaled_linear(cls, timesteps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
        """The quadratic rule with the endpoints of latent diffusion (Rombach et al. 2022).

        Raises: as :meth:`linear`.
        """
        return cls._build(_squared_linspace(timesteps, beta_start, beta_end), "scaled_linear")

    @classmethod
    def sigmoid(cls, timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """``beta_start + (beta_end - beta_start) * sigmoid(u)``, u evenly spaced over [-6, 6].

        As in the annotated DDPM article.

        Raises: as :meth:`linear`.
        """
        count = _check_count(timesteps)
        start, end = _check_endpoints(beta_start, beta_end)
        u = np.linspace(-6.0, 6.0, count, dtype=np.float64)
        return cls._build(1.0 / (1.0 + np.exp(-u)) * (end - start) + start, "sigmoid")

    @classmethod
    def cosine(cls, timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """abar follows a squared cosine with offset `s`; betas are capped at `max_beta`.

        Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), eq. 17.

        Raises:
            TypeError: `timesteps` is no int, or `s` or `max_beta` no real number.
            ValueError: T < 1, ``s < 0`` or `max_beta` outside (0, 1].
        """
        count = _check_count(timesteps)
        offset = _check_real("s", s)
        cap = _check_real("max_beta", max_beta)
        if offset < 0.0:
            raise ValueError(f"s must be at least 0, got {s}")
        if not 0.0 < cap <= 1.0:
            raise ValueError(f"max_beta must lie in (0, 1], got {max_beta}")

        def abar(u: float) -> float:
            return math.cos((u + offset) / (1.0 + offset) * math.pi / 2) ** 2

        betas = [min(1 - abar((i + 1) / count) / abar(i / count), cap) for i in range(count)]
        return cls._build(np.array(betas, dtype=np.float64), "cosine")

    @classmethod
    def from_betas(cls, betas: Tensor | npt.ArrayLike) -> NoiseSchedule:
        """A schedule with the given betas, shape ``(T,)``, in any order and any real dtype (used in float64).

        Every beta must lie in (0, 1); the last may be exactly 1 (zero terminal signal-to-noise ratio).

        Raises:
            TypeError: not a tensor, array or sequence of real numbers.
            ValueError: empty, not one-dimensional, or a beta outside the range; the first bad index is
                named.
        """
        array = _real_array("betas", betas)
        if array.ndim != 1:
            raise ValueError(f"betas must have one dimension, got shape {tuple(array.shape)}")
        return cls._build(array, "from_betas")

    @classmethod
    def from_tables(
        cls,
        tables: Mapping[str, Tensor | npt.ArrayLike],
        timestep_map: Sequence[int] | None = None,
        original_timesteps: int | None = None,
    ) -> NoiseSchedule:
        """The schedule of somebody else's diffusion object, with that object's own tables, to the bit.

        Tables that were kept in float32 cannot be computed again from float32 betas. Those given replace the
        ones that would follow from the betas; a schedule respaced from this one computes all of them anew,
        from `alphas_cumprod`.

        Args:
            tables: "betas", and any of the tables that this class has, by name, each ``(T,)`` in any real
                dtype.
            timestep_map: the number of each step in the schedule that the object was respaced from.
            original_timesteps: the number of steps of that schedule.

        Raises:
            TypeError: a table of no real numbers.
            ValueError: a table of another length, or one that is not known, or betas that :meth:`from_betas`
                would refuse.
        """
        label = "imported"
        if "betas" not in tables:
            raise ValueError("tables must hold 'betas'")
        betas = _real_array("betas", tables["betas"])
        if betas.ndim != 1:
            raise ValueError(f"betas must have one dimension, got shape {betas.shape}")
        _check_betas(betas, label)
        known = _tables(betas)
        imported: dict[str, _Array] = {}
        for name, values in tables.items():
            if name == "betas":
                continue
            if name not in known:
                raise ValueError(f"tables holds {name!r}, which is none of {', '.join(known)}")
            array = _real_array(name, values)
            if array.shape != betas.shape:
                raise ValueError(f"{name} must have shape {betas.shape} as betas has, got {array.shape}")
            imported[name] = array
        if timestep_map is not None and len(timestep_map) != len(betas):
            raise ValueError(f"timestep_map must have {len(betas)} entries, got {len(timestep_map)}")
        return cls._build(betas, label, timestep_map, original_timesteps, imported)

    @classmethod
    def named(cls, name: str, timesteps: int) -> NoiseSchedule:
        """The schedule called `name` with its default parameters.

        `name` is one of linear, cosine, quadratic, sigmoid, scaled_linear.

        Raises:
            TypeError: `name` is no string or `timesteps` no int.
            ValueError: unknown name, or T < 1.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        makers: dict[str, Callable[[int], NoiseSchedule]] = {
            "linear": cls.linear,
            "cosine": cls.cosine,
            "quadratic": cls.quadratic,
            "sigmoid": cls.sigmoid,
            "scaled_linear": cls.scaled_linear,
        }
        if name not in makers:
            raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(makers)}")
        return makers[name](timesteps)

    @classmethod
    def log_snr(cls, name: str, steps: int) -> NoiseSchedule:
        """Continuous time, cut into `steps` equal steps from t = 1 to t = 0.

        abar is the sigmoid of the log signal-to-noise ratio: "cosine" is -log(tan^2(pi/2 (t + 0.008) / 1.008)),
        "linear" -log(expm1(1e-4 + 10 t^2)) (Kingma, Salimans, Poole, Ho, "Variational Diffusion Models" (2021),
        as in Imagen, Saharia et al. 2022). It is computed in float32, the precision in which networks that are
        told it were trained. The last step ends at t = 0, where some noise is left (a ratio of about 8.8 and
        9.2): `alphas_cumprod_prev` does not start with 1.

        A network gets the log signal-to-noise ratio as t. To make fewer steps, make another schedule.

        Raises:
            TypeError: `steps` is no int.
            ValueError: an unknown name, or steps < 1.
        """
        if name not in _LOG_SNR:
            raise ValueError(f"unknown log_snr schedule {name!r}: choose one of {', '.join(_LOG_SNR)}")
        t = torch.linspace(1.0, 0.0, _check_count(steps) + 1)  # downwards, as networks have seen it rounded
        values = _LOG_SNR[name](t).flip(0)
        ratio = values.double().numpy()
        abar = 1.0 / (1.0 + np.exp(-ratio))
        betas = 1.0 - abar[1:] / abar[:-1]
        tables = _tables(betas, abar[1:], float(abar[0]))
        return cls._build(betas, f"log_snr {name}", imported=tables, network_times=values[1:].tolist())

    # ------------------------------------------------------------------ tables

    @property
    def network_times(self) -> Tensor:
        """``(T,)``: what a network gets as t.

        `timestep_map`; float32 log signal-to-noise ratios of :meth:`log_snr`; or float32 places between timesteps of
        :meth:`karras`.
        """
        return torch.tensor(self._network_times) if self._network_times else self.timestep_map

    @property
    def name(self) -> str:
        """What made it: "linear", "from_betas", "log_snr", "karras" and so on."""
        return self._label.split()[0]

    @property
    def timesteps(self) -> int:
        """T, the number of steps of this schedule."""
        return len(self._betas)

    @property
    def original_timesteps(self) -> int:
        """The number of steps of the schedule that this one was respaced from (T itself if it was not)."""
        return self._original_timesteps

    @property
    def is_imported(self) -> bool:
        """Whether tables of this schedule are another object's own (:meth:`from_tables`)."""
        return bool(self._imported) and not self._network_times

    @property
    def timestep_map(self) -> Tensor:
        """int64 ``(T,)``: the number that each step has in the original schedule, ascending."""
        return torch.tensor(self._timestep_map, dtype=torch.int64)

    @property
    def betas(self) -> Tensor:
        """float64 ``(T,)``: the variance added at each step."""
        return torch.from_numpy(self._betas.copy())

    @property
    def alphas(self) -> Tensor:
        """float64 ``(T,)``: 1 - beta."""
        return self._table("alphas")

    @property
    def alphas_cumprod(self) -> Tensor:
        """float64 ``(T,)``: abar, the product of the alphas up to and including each step."""
        return self._table("alphas_cumprod")

    @property
    def alphas_cumprod_prev(self) -> Tensor:
        """float64 ``(T,)``: abar of the step before (cleaner), 1 at index 0."""
        return self._table("alphas_cumprod_prev")

    @property
    def sqrt_alphas_cumprod(self) -> Tensor:
        """float64 ``(T,)``: sqrt(abar), the factor of x_0 in x_t."""
        return self._table("sqrt_alphas_cumprod")

    @property
    def sqrt_one_minus_alphas_cumprod(self) -> Tensor:
        """float64 ``(T,)``: sqrt(1 - abar), the factor of the noise in x_t."""
        return self._table("sqrt_one_minus_alphas_cumprod")

    @property
    def sqrt_recip_alphas_cumprod(self) -> Tensor:
        """float64 ``(T,)``: sqrt(1 / abar); infinite where abar is 0."""
        return self._table("sqrt_recip_alphas_cumprod")

    @property
    def sqrt_recipm1_alphas_cumprod(self) -> Tensor:
        """float64 ``(T,)``: sqrt(1 / abar - 1); infinite where abar is 0."""
        return self._table("sqrt_recipm1_alphas_cumprod")

    @property
    def posterior_variance(self) -> Tensor:
        """float64 ``(T,)``: variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7); 0 at index 0."""
        return self._table("posterior_variance")

    @property
    def posterior_log_variance_clipped(self) -> Tensor:
        """float64 ``(T,)``: log of the posterior variance.

        Index 0, whose variance is 0, takes the value of index 1. A schedule of one step has no index 1 and
        takes log(1e-20).
        """
        return self._table("posterior_log_variance_clipped")

    @property
    def posterior_mean_coef1(self) -> Tensor:
        """float64 ``(T,)``: the factor of x_0 in the mean of q(x_{t-1} | x_t, x_0) (eq. 7)."""
        return self._table("posterior_mean_coef1")

    @property
    def posterior_mean_coef2(self) -> Tensor:
        """float64 ``(T,)``: the factor of x_t in the mean of q(x_{t-1} | x_t, x_0) (eq. 7)."""
        return self._table("posterior_mean_coef2")

    @property
    def snr(self) -> Tensor:
        """float64 ``(T,)``: the signal-to-noise ratio abar / (1 - abar)."""
        return self._table("snr")

    def noising_coefficients(self, device: torch.device | str = "cpu") -> Tensor:
        """float32 ``(T, 2)`` on `device`: sqrt(abar) and sqrt(1 - abar), what q_sample multiplies with.

        Made once for each device and shared by all callers, so it must not be written into.
        """
        key = torch.device(device)
        table = self._device_tables.get(key)
        if table is None:
            # Cast on the CPU, where the float64 values live: every device then holds the same bits.
            columns = np.stack(
                [self._tables["sqrt_alphas_cumprod"], self._tables["sqrt_one_minus_alphas_cumprod"]], axis=1
            )
            table = torch.from_numpy(columns).float().to(key)
            self._device_tables[key] = table
        return table

    def _table(self, name: str) -> Tensor:
        return torch.from_numpy(self._tables[name].copy())

    # ------------------------------------------------------------------ derived schedules

    def respace(self, steps: int | str | Iterable[int], spacing: str | None = None) -> NoiseSchedule:
        """A schedule of fewer steps whose abar agrees with this one's at the steps that are kept.

        `steps` is one of:

        - an int n: n steps chosen by `spacing`. None chooses as ``str(n)`` does. "leading", "trailing" and
          "linspace" are the three of Lin et al. 2024, table 2: multiples of T // n from 0; T - 1 downwards
          by T / n; evenly spaced from 0 to T - 1, rounded.
        - "10,10,5": T is cut into sections as equal as possible, cleanest first, and each gives that many
          evenly spaced steps, its first and its last among them (Nichol, Dhariwal 2021).
        - "ddim50": every k-th step from 0, with the smallest k that gives exactly 50.
        - "fast27": "10,10,3,2,2" with T - 3 in the place of T - 1 (GLIDE's upsampler, Nichol et al. 2022).
        - the steps themselves, as numbers of this schedule (0 .. T-1), ascending or descending.

        Returns: a schedule whose `timestep_map` holds the original numbers, ascending.

        Raises:
            TypeError: `steps` is nothing of these.
            ValueError: an impossible number of steps, a step that is out of range, repeated or out of
                order, an unknown `spacing`, or a `spacing` beside anything but an int.
        """
        kept = kept_steps(steps, spacing, self.timesteps)
        if len(kept) == self.timesteps:
            return self
        if self._network_times:
            raise ValueError(f"a {self.name} schedule cannot be respaced: make another with the steps wanted")
        abar = self._tables["alphas_cumprod"][kept]
        with np.errstate(divide="ignore", invalid="ignore"):
            betas = 1.0 - abar / np.append(1.0, abar[:-1])
        return self._build(betas, self._label, [self._timestep_map[k] for k in kept], self._original_timesteps)

    def karras(self, steps: int, rho: float = 7.0) -> NoiseSchedule:
        """Noise levels of Karras et al. from this schedule's last to its first, denser where there is less noise.

        sigma = sqrt(1 / abar - 1) is spaced evenly in sigma^(1 / rho) (Karras, Aittala, Aila, Laine, "Elucidating the
        Design Space of Diffusion-Based Generative Models" (2022), eq. 5). The levels lie between timesteps, and a
        network gets such a place as a float32 t: linear in log sigma between the two neighbours, as k-diffusion's
        wrappers of discrete models have it. `timestep_map` holds the timesteps next to the levels, of which several
        may be the same.

        Raises:
            TypeError: `steps` is no int or `rho` no real number.
            ValueError: steps < 1, rho <= 0, or a schedule of :meth:`log_snr` or this, whose levels are fixed, or with
                a level that has no signal.
        """
        count = _check_count(steps, "steps")
        if _check_real("rho", rho) <= 0.0:
            raise ValueError(f"rho must be more than 0, got {rho}")
        if self._network_times:
            raise ValueError(f"a {self.name} schedule has levels of its own and no others")
        abar = self._tables["alphas_cumprod"]
        if abar[-1] == 0.0:
            raise ValueError("karras needs a finite sigma, and the last level of this schedule has no signal")
        sigmas = np.sqrt((1.0 - abar) / abar)
        spaced = np.linspace(sigmas[-1] ** (1.0 / rho), sigmas[0] ** (1.0 / rho), count)[::-1] ** rho
        spaced[0], spaced[-1] = sigmas[0], sigmas[-1]  # the power and its root round
        times = np.interp(np.log(spaced), np.log(sigmas), np.array(self._timestep_map, dtype=np.float64))
        levels = 1.0 / (1.0 + spaced**2)
        betas = 1.0 - levels / np.append(1.0, levels[:-1])
        return self._build(
            betas,
            "karras",
            [int(t) for t in np.rint(times)],
            self._original_timesteps,
            imported=_tables(betas, levels),
            network_times=torch.from_numpy(times).float().tolist(),
        )

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """Shift and scale sqrt(abar) so that the last step is pure noise and the first keeps its value.

        Lin, Liu, Li, Yang, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2024), algorithm
        1. The last beta becomes exactly 1, so a network that predicts epsilon cannot be sampled with the
        result.

        Raises:
            ValueError: the schedule has only one step.
        """
        if self._network_times:
            raise ValueError(f"a {self.name} schedule cannot be rescaled: its levels are what its network is told")
        if self.timesteps < 2:
            raise ValueError("rescale_zero_terminal_snr needs at least 2 timesteps, this schedule has 1")
        root = self._tables["sqrt_alphas_cumprod"]
        abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        betas = 1.0 - np.append(abar[0], abar[1:] / abar[:-1])
        return self._build(betas, self._label, self._timestep_map, self._original_timesteps)

    # ------------------------------------------------------------------ object protocol

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"NoiseSchedule is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"NoiseSchedule is immutable: cannot delete {name!r}")

    def __len__(self) -> int:
        return len(self._betas)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseSchedule):
            return NotImplemented
        return (
            np.array_equal(self._betas, other._betas)
            and self._timestep_map == other._timestep_map
            and self._original_timesteps == other._original_timesteps
            and self._network_times == other._network_times
            and self._imported.keys() == other._imported.keys()
            and all(np.array_equal(table, other._imported[name]) for name, table in self._imported.items())
        )

    def __hash__(self) -> int:
        return hash((self._betas.tobytes(), self._timestep_map, self._original_timesteps))

    def __reduce__(self) -> tuple[Callable[..., NoiseSchedule], tuple[object, ...]]:
        return (
            type(self)._build,
            (
                self._betas,
                self._label,
                self._timestep_map,
                self._original_timesteps,
                self._imported,
                self._network_times,
            ),
        )

    def __repr__(self) -> str:
        origin = "" if self._original_timesteps == self.timesteps else f" of {self._original_timesteps}"
        abar = self._tables["alphas_cumprod"]
        return (
            f"NoiseSchedule({self._label}, timesteps={self.timesteps}{origin}, "
            f"betas {self._betas[0]:.6g} .. {self._betas[-1]:.6g}, "
            f"alphas_cumprod {abar[0]:.6g} .. {abar[-1]:.6g})"
        )


# ---------------------------------------------------------------------- tables


def _tables(betas: _Array, levels: _Array | None = None, start: float = 1.0) -> dict[str, _Array]:
    """Every table; `levels`, abar, where the betas were made from it, and `start` where it does not start from 1."""
    alphas = 1.0 - betas
    abar = np.cumprod(alphas) if levels is None else levels
    abar_prev = np.append(start, abar[:-1])
    variance = betas * (1.0 - abar_prev) / (1.0 - abar)
    floor = variance[1] if len(betas) > 1 else 1e-20
    # A vanishing abar gives infinities in two columns; whoever needs these two refuses them.
    with np.errstate(divide="ignore", over="ignore"):
        recip = 1.0 / abar
    return {
        "alphas": alphas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": abar_prev,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - abar),
        "sqrt_recip_alphas_cumprod": np.sqrt(recip),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(recip - 1.0),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.append(floor, variance[1:])),
        "posterior_mean_coef1": betas * np.sqrt(abar_prev) / (1.0 - abar),
        "posterior_mean_coef2": (1.0 - abar_prev) * np.sqrt(alphas) / (1.0 - abar),
        "snr": abar / (1.0 - abar),
    }


def _log_snr_cosine(t: Tensor) -> Tensor:
    return -torch.log((torch.cos((t + 0.008) / 1.008 * math.pi * 0.5) ** -2 - 1).clamp(min=1e-5))


def _log_snr_linear(t: Tensor) -> Tensor:
    return -torch.log(torch.expm1(1e-4 + 10 * t**2))


_LOG_SNR: dict[str, Callable[[Tensor], Tensor]] = {"cosine": _log_snr_cosine, "linear": _log_snr_linear}


def _squared_linspace(timesteps: int, beta_start: float, beta_end: float) -> _Array:
    count = _check_count(timesteps)
    start, end = _check_endpoints(beta_start, beta_end)
    return np.linspace(math.sqrt(start), math.sqrt(end), count, dtype=np.float64) ** 2


# ---------------------------------------------------------------------- choice of steps


def kept_steps(steps: int | str | Iterable[int], spacing: str | None, total: int) -> list[int]:
    """The steps to keep, ascending, each in 0 .. total - 1 and once."""
    is_count = isinstance(steps, (int, np.integer)) and not isinstance(steps, bool)
    if spacing is not None:
        if spacing not in _SPACINGS:
            raise ValueError(f"spacing must be None or one of {', '.join(_SPACINGS)}, got {spacing!r}")
        if not is_count:
            raise ValueError(f"spacing={spacing!r} needs a number of steps, got steps={steps!r}")
    if isinstance(steps, str):
        return _from_specification(steps, total)
    if is_count:
        count = int(steps)  # type: ignore[arg-type]
        if not 1 <= count <= total:
            raise ValueError(f"steps must be between 1 and the schedule's {total}, got {count}")
        return _spaced(count, spacing, total)
    if isinstance(steps, Tensor):
        if steps.dtype.is_floating_point or steps.dtype.is_complex or steps.dtype == torch.bool:
            raise TypeError(f"steps must hold integers, got a tensor of {steps.dtype}")
        steps = steps.reshape(-1).tolist()
    if isinstance(steps, bool) or not isinstance(steps, Iterable):
        raise TypeError(
            f"steps must be an int, a string such as '50', '10,10,5', 'ddim50' or 'fast27', or the steps themselves; "
            f"got {type(steps).__name__}"
        )
    return _explicit(list(steps), total)


def _explicit(steps: list[int], total: int) -> list[int]:
    if not steps:
        raise ValueError("steps is empty: at least one step must be kept")
    for position, step in enumerate(steps):
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)):
            raise TypeError(f"steps[{position}] must be an int, got {type(step).__name__}")
        if not 0 <= step < total:
            raise ValueError(f"steps[{position}] = {step} is outside 0 .. {total - 1}")
    ordered = [int(step) for step in steps]
    if len(ordered) > 1 and ordered[0] > ordered[1]:
        ordered.reverse()
    for before, after in pairwise(ordered):
        if before == after:
            raise ValueError(f"steps holds {before} more than once")
        if before > after:
            raise ValueError("steps must be ascending or descending throughout")
    return ordered


def _spaced(count: int, spacing: str | None, total: int) -> list[int]:
    if spacing is None:
        return _sections([count], total)
    if spacing == "leading":
        return [k * (total // count) for k in range(count)]
    if spacing == "linspace":
        return [round(float(v)) for v in np.linspace(0, total - 1, count)]
    # Trailing. np.arange spaces by the rounded difference of its first two values, and so do those who use
    # it; it may also yield one value too many, just above 0, which the slice leaves out.
    downwards = np.arange(total, 0, -(total / count))[:count]
    return sorted(round(float(v)) - 1 for v in downwards)


def _from_specification(text: str, total: int) -> list[int]:
    if text.startswith("ddim"):
        count = _parse_count(text.removeprefix("ddim"), text)
        for stride in range(1, total):
            if len(range(0, total, stride)) == count:
                return list(range(0, total, stride))
        raise ValueError(f"steps={text!r}: no integer stride takes exactly {count} of {total} steps")
    if text == "fast27":
        return [*_sections([10, 10, 3, 2, 2], total)[:-1], total - 3]
    return _sections([_parse_count(part, text) for part in text.split(",")], total)


def _parse_count(digits: str, text: str) -> int:
    stripped = digits.strip()
    if not (stripped.isascii() and stripped.isdigit()):
        raise ValueError(f"steps={text!r} is not understood: write '50', '10,10,5', 'ddim50' or 'fast27'")
    return int(stripped)


def _sections(counts: list[int], total: int) -> list[int]:
    if sum(counts) < 1:
        raise ValueError("steps selects nothing: at least one step must be kept")
    size, longer = divmod(total, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(f"cannot take {count} steps from section {section}, which has {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # The position is summed up, not multiplied out: the roundings at ties are then openai's.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return kept


# ---------------------------------------------------------------------- checks


def _check_betas(betas: _Array, label: str) -> None:
    if len(betas) == 0:
        raise ValueError(f"{label}: betas is empty, at least one timestep is needed")
    allowed = (betas > 0.0) & (betas < 1.0)  # False for NaN and the infinities too
    allowed[-1] |= betas[-1] == 1.0
    if not allowed.all():
        index = int(np.argmin(allowed))
        raise ValueError(
            f"{label}: betas[{index}] = {betas[index]} is outside (0, 1); only the last beta may be exactly 1"
        )
    if (1.0 - betas[0]) == 1.0:
        raise ValueError(f"{label}: betas[0] = {betas[0]} is too small, 1 - beta rounds to 1 in float64")


def _real_array(name: str, values: Tensor | npt.ArrayLike) -> _Array:
    """A float64 copy."""
    if isinstance(values, Tensor):
        if values.dtype.is_complex:
            raise TypeError(f"{name} must be real numbers, got dtype {values.dtype}")
        return values.detach().to(device="cpu", dtype=torch.float64).numpy().copy()
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a tensor, array or sequence of real numbers, got {type(values).__name__}"
        ) from error


def _check_count(count: int, name: str = "timesteps") -> int:
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return int(count)


def _check_real(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _check_endpoints(beta_start: float, beta_end: float) -> tuple[float, float]:
    start, end = _check_real("beta_start", beta_start), _check_real("beta_end", beta_end)
    for name, value in (("beta_start", start), ("beta_end", end)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must lie in (0, 1), got {value}")
    if start > end:
        raise ValueError(f"beta_start = {start} must not exceed beta_end = {end}")
    return start, end
