"""Which code runs: the choice of a back-end, and the reason why one cannot run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

NAMES = ("reference", "cpu", "triton", "cuda")

Support = tuple[bool, str]


def dtype_name(dtype: torch.dtype) -> str:
    """As reasons and errors name it: "float32"."""
    return str(dtype).removeprefix("torch.")


def tf32_allowed() -> bool:
    """Whether torch has been told that float32 may be multiplied with tf32's digits on a CUDA device.

    Whoever sets ``allow_tf32`` sets this setting too; reading ``allow_tf32`` raises where this one was set by itself.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class BackendUnavailableError(RuntimeError):
    """A back-end that was asked for by name cannot run this call. The message gives the reason and the remedy."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    ``available()`` says whether it can run on this machine at all, ``supports(tensor, ...)`` whether it can run
    this call; both answer ``(ok, reason)``. ``fuses_projection(...)`` says whether its forward pass should be given the
    input projection of this call to do as well.
    """

    forward: Callable
    backward: Callable
    available: Callable[[], Support] = lambda: (True, "")
    supports: Callable[..., Support] = lambda tensor, **options: (True, "")
    fuses_projection: Callable[..., bool] = lambda *arguments: False


@dataclass(frozen=True)
class BackendTable:
    """The back-ends of one op, and the measured order in which ``auto`` tries them on each kind of device.

    What has no implementation of the op is not in ``backends``.
    """

    op: str
    backends: Mapping[str, Backend]
    preference: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"cpu": ("cpu", "reference")})

    def resolve(self, name: str, tensor: torch.Tensor, **options: object) -> Backend:
        """The back-end for this call. ``auto`` never fails: the reference runs everywhere."""
        if name == "auto":
            for candidate in self.preference.get(tensor.device.type, ("reference",)):
                ok, _ = self.supports(candidate, tensor, **options)
                if ok:
                    return self.backends[candidate]
            name = "reference"
        ok, reason = self.supports(name, tensor, **options)
        if not ok:
            raise BackendUnavailableError(
                f"{self.op}: backend {name!r} cannot run this call: {reason}. Use backend='auto' or 'reference'."
            )
        return self.backends[name]

    def available(self, name: str) -> Support:
        """Whether that back-end can run this op on this machine at all, and the reason where it cannot."""
        if name not in self.backends:
            return False, f"it has no kernel for {self.op} yet"
        return self.backends[name].available()

    def supports(self, name: str, tensor: torch.Tensor, **options: object) -> Support:
        """Whether that back-end can run this call, and the reason where it cannot."""
        ok, reason = self.available(name)
        return self.backends[name].supports(tensor, **options) if ok else (ok, reason)
