"""Inputs: the shapes, the memory layouts and the rules that the tests go through."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import tp_kernels as tp
from tp_kernels.rules import Sweep

DTYPES = (torch.float32, torch.float64)
NONLINEARITIES = ("tanh", "relu", "identity")


def _larger(tensor: Tensor, extra: int) -> Tensor:
    """Memory for the tensor with ``extra`` NaN after each row: reading outside of the view shows."""
    return tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + extra), torch.nan)


def _offset(tensor: Tensor) -> Tensor:
    memory = tensor.new_full((tensor.numel() + 7,), torch.nan)
    view = memory[3 : 3 + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def _sliced(tensor: Tensor) -> Tensor:
    memory = _larger(tensor, tensor.shape[-1])
    return memory[..., ::2].copy_(tensor)


def _padded(tensor: Tensor) -> Tensor:
    memory = _larger(tensor, 5)
    return memory[..., : tensor.shape[-1]].copy_(tensor)


# Each gives the same values in another place: what a function must not notice. A vector has no other order of its axes.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "permuted": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor,
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
    "sliced": _sliced,
    "padded": _padded,
    "offset": _offset,
}


def matrices(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random matrices, the largest singular value of each between 1 and 2."""
    numbers = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=numbers, dtype=torch.float64) / max(shape[-2:]) ** 0.5).to(dtype)


def spectrum(shape: tuple[int, ...], gains: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random matrices with the given singular values."""
    left, _, right = torch.linalg.svd(matrices(shape, torch.float64, seed), full_matrices=False)
    return (left * gains @ right).to(dtype)


def hard_matrices(shape: tuple[int, int], size: float) -> Tensor:
    """[4, *shape], float32, singular values up to about ``size``: full rank, twelve decades, rank 1, zero."""
    gains = torch.logspace(0, -12, shape[-1], dtype=torch.float64)
    rank_1 = torch.eye(shape[-1], dtype=torch.float64)[0]
    spectra = [spectrum(shape, values, torch.float64) for values in (gains, rank_1, 0 * gains)]
    return torch.stack([matrices(shape, torch.float64), *spectra]).mul(size).float()


class Inputs(NamedTuple):
    """What a cell's public function is given. ``None``: it is not there. ``h0``: all parts, side by side."""

    u: Tensor
    weight: Tensor
    bias: Tensor | None
    h0: Tensor | None


@dataclass(frozen=True)
class Case:
    """One call of a cell; ``str()`` of it is its id. ``bias`` is the cell's own, where it has one."""

    T: int = 3
    B: int = 2
    N: int = 5
    H: int | None = None
    cell: str = "rnn_tanh"
    bias: bool = True
    h0: bool = True

    def __str__(self) -> str:
        heads = [] if self.H is None else [f"H{self.H}"]
        without = [word for word, there in (("nobias", self.bias), ("zero", self.h0)) if not there]
        return "-".join([self.cell.removeprefix("rnn_"), f"T{self.T}", f"B{self.B}", *heads, f"N{self.N}", *without])

    @property
    def op(self) -> str:
        """The name of the public function."""
        return self.cell.partition("_")[0]

    @property
    def gates(self) -> int:
        return {"gru": 3, "lstm": 4}.get(self.cell, 1)

    @property
    def states(self) -> int:
        """The parts of a state."""
        return 2 if self.cell == "lstm" else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of h."""
        return self.T, self.B, *self.heads, self.N

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of one step's state, all parts."""
        return self.B, *self.heads, self.states * self.N

    @property
    def heads(self) -> tuple[int, ...]:
        return () if self.H is None else (self.H,)

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """W has a spectral radius of about 0.9, so that states stay bounded without an activation."""
        numbers = torch.Generator().manual_seed(seed)

        def random(scale: float, *shape: int) -> Tensor:
            return (scale * torch.randn(shape, generator=numbers, dtype=torch.float64)).to(dtype)

        wide = self.gates * self.N
        return Inputs(
            u=random(1 if self.gates > 1 else 0.7, *self.shape[:-1], wide),
            weight=random(0.9 / self.N**0.5, *self.heads, wide, self.N),
            bias=random(0.5, *self.heads, self.N) if self.cell == "gru" and self.bias else None,
            h0=random(1, *self.state_shape) if self.h0 else None,
        )

    def gradient(self, dtype: torch.dtype, seed: int = 1) -> Tensor:
        """What arrives from the loss at every h."""
        numbers = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=numbers, dtype=torch.float64).to(dtype)

    def gradient_of_state(self, dtype: torch.dtype, seed: int = 3) -> Tensor:
        """What arrives at one state, all parts."""
        numbers = torch.Generator().manual_seed(seed)
        return torch.randn((self.T, *self.state_shape), generator=numbers, dtype=torch.float64)[0].to(dtype)

    def feedback(self, dtype: torch.dtype, sweep: Sweep, seed: int = 2) -> Tensor | None:
        """Some P where the sweep needs one; of all blocks of the weight where it needs several."""
        if not sweep.uses_inverse:
            return None
        numbers = torch.Generator().manual_seed(seed)
        blocks = (3,) if self.cell == "gru" and sweep.inverse == "layer" else ()
        shape = (*self.heads, *blocks, self.N, self.N)
        return (0.54 / self.N**0.5 * torch.randn(shape, generator=numbers, dtype=torch.float64)).to(dtype)

    def with_(self, **changes: object) -> "Case":
        return replace(self, **changes)


CELLS = ("rnn_tanh", "rnn_relu", "rnn_identity", "gru", "lstm")

# Edges of register blocks: widths around 4, 8 and 16 lanes and their multiples, batches around 8 rows of a block and 48
# of a tile, and of several tiles on one thread.
TILE_CASES = tuple(
    Case(T=2, B=B, N=N)
    for B, *sizes in (
        (0, 5, 64),
        (1, 1, 3, 5, 16, 17, 33, 128, 257),
        (2, 2, 4, 15, 100),
        (3, 7, 48),
        (5, 8, 31),
        (7, 9, 16, 65),
        (8, 5, 17, 64),
        (9, 3, 16, 33, 129),
        (16, 15),
        (17, 32),
        (33, 1, 63, 100),
        (47, 4),
        (48, 5, 16),
        (49, 8, 17),
        (97, 7),
        (100, 33),
        (145, 64),
    )
    for N in sizes
)
TIME_CASES = tuple(
    Case(T=T, B=B, N=N, cell=cell, h0=T % 2 == 0)
    for T in (1, 2, 63, 64, 65, 1000)
    for B, N, cell in ((1, 16, "rnn_tanh"), (2, 33, "rnn_relu"), (7, 5, "rnn_identity"))
)
HEAD_CASES = tuple(
    Case(T=T, B=B, H=H, N=N, cell=cell)
    for H in (1, 3)
    for T, B, N, cell in (
        (1, 2, 5, "rnn_tanh"),
        (65, 7, 17, "rnn_tanh"),
        (4, 16, 64, "rnn_relu"),
        (3, 0, 3, "rnn_identity"),
    )
)

# Every rule there is, with the default numbers or with others.
RULES: dict[str, tp.BackProp | tp.TargetProp] = {
    "bp": tp.BackProp(),
    "weight-total": tp.TargetProp(),
    "weight-local": tp.TargetProp(update="local", step=0.3),
    "weight1-total": tp.TargetProp(power=1.0, step=2.0),
    "layer-total": tp.TargetProp(inverse="layer", clip=0.1),
    "layer-local": tp.TargetProp.paper(reg=0.5),
    "layerhalf-local": tp.TargetProp(inverse="layer", update="local", power=0.5, reg=0.1),
    "difference-total": tp.TargetProp(inverse="layer", mode="difference", clip=0.1, step=0.3),
    "difference-local": tp.TargetProp(inverse="layer", mode="difference", update="local", power=0.5, reg=0.1, clip=0.1),
    "direct-total": tp.TargetProp(inverse="layer", mode="direct", clip=0.1, step=0.3),
    "direct-local": tp.TargetProp(inverse="layer", mode="direct", update="local", power=0.5, reg=0.1, clip=0.1),
    "jacobian-total": tp.TargetProp(inverse="jacobian"),
    "jacobian-local": tp.TargetProp(inverse="jacobian", update="local", reg=0.5, step=0.7, rtol=1e-5),
    "identity-total": tp.TargetProp(inverse="identity", step=0.7),
    "identity-local": tp.TargetProp(inverse="identity", update="local"),
}

GRU_RULES = {name: rule for name, rule in RULES.items() if getattr(rule, "mode", "linearized") == "linearized"}
LSTM_RULES = {name: rule for name, rule in GRU_RULES.items() if getattr(rule, "inverse", "") != "layer"}


def rules_of(cell: str) -> dict[str, tp.BackProp | tp.TargetProp]:
    """Those that it has."""
    return {"gru": GRU_RULES, "lstm": LSTM_RULES}.get(cell, RULES)


# Every rule of every cell; and with every activation at least once each of its functions.
ALL_SWEEPS = tuple((cell, rule) for cell in CELLS for rule in rules_of(cell))
SWEEPS = tuple(
    (cell, rule)
    for cell, rule in ALL_SWEEPS
    if rule
    in {
        "rnn_relu": ("bp", "weight-total", "layer-local", "difference-total", "direct-total", "jacobian-total"),
        "rnn_identity": ("bp", "weight-local", "layer-total", "difference-local", "direct-local", "jacobian-local"),
        "lstm": ("bp", "weight-total", "weight-local", "identity-total", "jacobian-total"),
    }.get(cell, RULES)
)
