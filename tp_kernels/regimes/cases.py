"""What is compared: the shapes (cases), the contenders, and the presets that name a whole grid of them."""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

import tp_kernels
from tp_kernels.rules import BackProp, Rule, TargetProp

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
PIXELS = 784  # a 28 x 28 image, read in T chunks of 784/T pixels


@dataclass(frozen=True)
class Case:
    """One shape on one device: T steps, batch B, hidden size N, input size M, and the number of CPU threads."""

    T: int
    N: int
    B: int
    M: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    def __str__(self) -> str:
        return f"T={self.T} N={self.N} B={self.B}"


@dataclass(frozen=True)
class Contender:
    """One way to compute the same training step.

    Args:
        name: short, as on the command line.
        role: "tp" or "bp".
        label: for a reader.
        rule: what its gradients must be; the float64 reference computes them for the check.
        build: (M, N, backend) -> module that takes [T, B, M] and returns the last state, [B, N].
        fused: runs on this library's kernels.
        library: what runs the recurrence of one that does not.
        period: steps that are timed together, where they are not alike.
    """

    name: str
    role: str
    label: str
    rule: Rule
    build: Callable[[int, int, str], nn.Module]
    fused: bool = False
    library: str = "torch"
    period: int = 1

    def why_not(self, case: Case, compile_max_T: int) -> str | None:
        """Why this contender is left out of this case; ``None`` if it takes part."""
        if self.name == "compile" and compile_max_T < case.T:
            return (
                f"T={case.T} is over --compile-max-T={compile_max_T}: "
                "torch.compile unrolls the loop, and compiling takes minutes"
            )
        if self.library == "jax":
            if importlib.util.find_spec("jax") is None:
                return "JAX is not installed: python -m pip install 'tp_kernels[jax]'"
            if case.device != "cpu" or case.threads != 1 or case.dtype not in ("float32", "float64"):
                return f"JAX is measured in float32 and float64 on one CPU thread, not {_kind(case)}"
        return None


def _kind(case: Case) -> str:
    return f"in {case.dtype} on {case.device}, threads={case.threads}"


class LastState(nn.Module):
    """The last state h, [B, N], of a layer with the interface of ``torch.nn.RNN``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        last = self.layer(x)[1]
        return (last[0] if isinstance(last, tuple) else last)[0]  # an LSTM has a pair


class CellLoop(nn.Module):
    """What one writes without a fused layer: ``torch.nn.RNNCell`` in a Python loop over time."""

    def __init__(self, M: int, N: int) -> None:
        super().__init__()
        self.cell = nn.RNNCell(M, N)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for x_t in x.unbind(0):
            state = self.cell(x_t, state)
        return state


def fused(
    name: str, role: str, label: str, rule: Rule, *, period: int = 1, layer: str = "RNN", **options: object
) -> Contender:
    """This library's layer of that name in ``nn``, with these options."""

    def build(M: int, N: int, backend: str) -> nn.Module:
        return LastState(getattr(tp_kernels.nn, layer)(M, N, rule=rule, backend=backend, **options))

    return Contender(name, role, label, rule, build, fused=True, period=period)


def in_jax(name: str, layer: str) -> Contender:
    """That layer of ``torch.nn`` in JAX."""

    def build(M: int, N: int, backend: str) -> nn.Module:
        from tp_kernels.regimes.jax_layer import JaxLayer  # imports jax, which need not be there

        return JaxLayer(layer, M, N)

    return Contender(name, "bp", "JAX, lax.scan", BackProp(), build, library="jax")


# Chunks of time: C and K.
_CUT = {"chunk": 128, "overlap": 16}
# The least memory: every 64th state is kept, the others are computed again, and there is no output of T states.
_CHECKPOINTS = {"checkpoint_every": 64, "return_sequence": False}


CONTENDERS = {
    contender.name: contender
    for contender in (
        fused("tp", "tp", "TP", TargetProp()),
        fused("tp-local", "tp", "TP, local update", TargetProp(update="local")),
        fused("tp-layer", "tp", "TP as in the paper", TargetProp.paper()),
        fused("tp-refresh8", "tp", "TP, P every 8 steps", TargetProp(), period=8, refresh=8),
        fused("tp-jacobian", "tp", "TP, inverse of the Jacobian", TargetProp(inverse="jacobian")),
        fused("tp-chunks", "tp", "TP in chunks, P every 8 steps", TargetProp(**_CUT), period=8, refresh=8),
        fused("tp-identity-chunks", "tp", "identity in chunks", TargetProp(inverse="identity", **_CUT)),
        fused("bp", "bp", "BP, same kernels", BackProp()),
        fused("bp-truncated", "bp", "truncated BP, same kernels", BackProp(**_CUT)),
        fused("tp-keep64", "tp", "TP, checkpoints", TargetProp(), **_CHECKPOINTS),
        fused("bp-keep64", "bp", "BP, checkpoints", BackProp(), **_CHECKPOINTS),
        Contender("nn.RNN", "bp", "torch.nn.RNN", BackProp(), lambda M, N, _: LastState(nn.RNN(M, N))),
        Contender("eager", "bp", "loop of RNNCell", BackProp(), lambda M, N, _: CellLoop(M, N)),
        Contender(
            "compile", "bp", "torch.compile of the loop", BackProp(), lambda M, N, _: torch.compile(CellLoop(M, N))
        ),
        in_jax("jax", "RNN"),
    )
}


@dataclass(frozen=True)
class Grid:
    """The whole map: every T with every N and every B. ``M=None`` reads an image of 784 pixels: M = 784/T."""

    T: tuple[int, ...]
    N: tuple[int, ...]
    B: tuple[int, ...]
    M: int | None = 1
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    contenders: tuple[str, ...] = ("tp", "tp-local", "bp", "nn.RNN", "eager")

    def cases(self) -> list[Case]:
        """Smallest first, so that an interrupted run leaves a whole corner of the map."""
        cases = [
            Case(T, N, B, PIXELS // T if self.M is None else self.M, self.dtype, self.device, self.threads)
            for T, N, B in itertools.product(self.T, self.N, self.B)
        ]
        return sorted(cases, key=lambda case: (case.T * case.B * case.N**2, case.T))

    def override(self, **values: object) -> "Grid":
        """The same grid with every value that is not ``None`` taken instead."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Effort:
    """How long to look at one cell.

    Args:
        seconds: aimed at for the timed rounds of one cell, all contenders together.
        min_rounds, max_rounds: the number of rounds stays between them.
        step_limit: a contender whose one step takes longer, in seconds, is left out with the reason.
        memory: whether peak memory is measured.
        compile_max_T: longest T for which the "compile" contender takes part.
    """

    seconds: float = 4.0
    min_rounds: int = 5
    max_rounds: int = 50
    step_limit: float = 30.0
    memory: bool = True
    compile_max_T: int = 64


@dataclass(frozen=True)
class Preset:
    grid: Grid
    effort: Effort = field(default_factory=Effort)


PRESETS = {
    "quick": Preset(Grid(T=(16, 64, 256, 784), N=(32, 64, 128), B=(1, 16)), Effort(seconds=0.6, max_rounds=25)),
    "default": Preset(
        Grid(
            T=(4, 16, 64, 256, 784, 3072),
            N=(16, 32, 64, 100, 128, 256, 512),
            B=(1, 16, 128),
            contenders=("tp", "tp-local", "tp-layer", "tp-keep64", "bp", "bp-keep64", "nn.RNN", "eager", "compile"),
        ),
        Effort(compile_max_T=16),
    ),
    # Length x width of Roulet and Harchaoui: 28 x 28 images in chunks of 196 ... 1 pixels.
    "paper": Preset(
        Grid(
            T=(4, 14, 49, 196, 392, 784),
            N=(16, 32, 64, 128, 256, 512),
            B=(512,),
            M=None,
            contenders=("tp", "tp-local", "tp-layer", "bp", "nn.RNN", "eager"),
        )
    ),
}


def spec(case: Case, contender: str, backend: str) -> dict:
    """What identifies one measurement; its canonical JSON is the key of its record."""
    return {"kind": "cell", **asdict(case), "contender": contender, "backend": backend}
