"""Inputs: the shapes, the memory layouts and the rules that the tests go through."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tp_kernels as tp

DTYPES = (torch.float32, torch.float64)
TIMES = (1, 2, 63, 64, 65, 1000)
BATCHES = (0, 1, 2, 5, 7, 16, 33)
SIZES = (1, 2, 3, 5, 15, 16, 17, 33, 64, 100, 128, 257)
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


# Each gives the same values in another place: what a function must not notice.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "permuted": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
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


@dataclass(frozen=True)
class RNNCase:
    """One call of ``rnn``; ``str()`` of it is its id."""

    T: int = 3
    B: int = 2
    N: int = 5
    H: int | None = None
    nonlinearity: str = "tanh"
    h0: bool = True

    def __str__(self) -> str:
        heads = "" if self.H is None else f"-H{self.H}"
        return f"T{self.T}-B{self.B}{heads}-N{self.N}-{self.nonlinearity}{'' if self.h0 else '-zero'}"

    @property
    def shape(self) -> tuple[int, ...]:
        heads = () if self.H is None else (self.H,)
        return self.T, self.B, *heads, self.N

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """u, W and h_0. W has a spectral radius of about 0.9, so that states stay bounded without an activation."""
        numbers = torch.Generator().manual_seed(seed)
        u = 0.7 * torch.randn(self.shape, generator=numbers, dtype=torch.float64)
        matrix = (*self.shape[2:], self.N)
        weight = 0.9 / self.N**0.5 * torch.randn(matrix, generator=numbers, dtype=torch.float64)
        h0 = torch.randn(self.shape[1:], generator=numbers, dtype=torch.float64) if self.h0 else None
        return u.to(dtype), weight.to(dtype), None if h0 is None else h0.to(dtype)

    def gradient(self, dtype: torch.dtype, seed: int = 1) -> Tensor:
        """What arrives from the loss at every state."""
        numbers = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=numbers, dtype=torch.float64).to(dtype)

    def with_(self, **changes: object) -> "RNNCase":
        return replace(self, **changes)


# Every batch with every width: edges of register blocks; and batches of several tiles (of 48 rows at most) on one
# thread. Then every length; then heads.
TILE_CASES = (
    *(RNNCase(T=2, B=B, N=N) for N in SIZES for B in BATCHES),
    *(RNNCase(T=3, B=B, N=N) for B, N in ((48, 5), (49, 17), (100, 33), (145, 64))),
)
TIME_CASES = tuple(
    RNNCase(T=T, B=B, N=N, nonlinearity=word, h0=T % 2 == 0)
    for T in TIMES
    for B, N, word in ((1, 16, "tanh"), (2, 33, "relu"), (7, 5, "identity"))
)
HEAD_CASES = tuple(
    RNNCase(T=T, B=B, H=H, N=N, nonlinearity=word)
    for H in (1, 3)
    for T, B, N, word in ((1, 2, 5, "tanh"), (65, 7, 17, "tanh"), (4, 16, 64, "relu"), (3, 0, 3, "identity"))
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


@dataclass(frozen=True)
class GRUCase:
    """One call of ``gru``; ``str()`` of it is its id."""

    T: int = 3
    B: int = 2
    N: int = 5
    bias: bool = True
    h0: bool = True

    def __str__(self) -> str:
        words = [word for word, there in (("nobias", self.bias), ("zero", self.h0)) if not there]
        return "-".join([f"T{self.T}-B{self.B}-N{self.N}", *words])

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """u, W, b and h_0."""
        numbers = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=numbers, dtype=torch.float64)

        u, weight = random(self.T, self.B, 3 * self.N), 0.9 / self.N**0.5 * random(3 * self.N, self.N)
        bias = 0.5 * random(self.N) if self.bias else None
        h0 = random(self.B, self.N) if self.h0 else None
        return tuple(None if tensor is None else tensor.to(dtype) for tensor in (u, weight, bias, h0))

    def gradient(self, dtype: torch.dtype, seed: int = 1) -> Tensor:
        """What arrives from the loss at every state."""
        return RNNCase(self.T, self.B, self.N).gradient(dtype, seed)

    def inverses(self, dtype: torch.dtype, inverse: str) -> Tensor | None:
        """Some P for the op."""
        blocks = {"weight": (), "layer": (3,)}
        return matrices((*blocks[inverse], self.N, self.N), dtype, seed=2) if inverse in blocks else None


GRU_RULES = {name: rule for name, rule in RULES.items() if getattr(rule, "mode", "linearized") == "linearized"}
