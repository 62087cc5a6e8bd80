"""CPU kernels. Every function takes addresses: call them through ``tp_kernels``, which checks and keeps the tensors."""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    flags: str
    openmp: bool

def rnn_fwd(
    *,
    double: bool,
    input: int,
    input_strides: tuple[int, int, int],
    projection: int,
    bias: int,
    projected: int,
    weight: int,
    h0: int,
    h: int,
    sizes: tuple[int, int, int, int],
    nonlinearity: str,
    threads: int,
) -> None: ...
def rnn_bwd(
    *,
    double: bool,
    grad_h: int,
    grad_h_strides: tuple[int, int, int],
    grad_last: int,
    h: int,
    weight: int,
    feedback: int,
    carried_in: int,
    through_in: int,
    carried_out: int,
    through_out: int,
    u: int,
    u_strides: tuple[int, int, int],
    h0: int,
    grad_u: int,
    iterations: int,
    sizes: tuple[int, int, int, int],
    nonlinearity: str,
    inverse: str,
    update: str,
    step: float,
    clip: float,
    reg: float,
    rtol: float,
    first: int,
    threads: int,
) -> tuple[int, int, int, float] | None: ...
def gru_fwd(
    *,
    double: bool,
    u: int,
    u_strides: tuple[int, int],
    weight: int,
    bias: int,
    h0: int,
    h: int,
    gates: int,
    sizes: tuple[int, int, int],
    threads: int,
) -> None: ...
def gru_bwd(
    *,
    double: bool,
    grad_h: int,
    grad_h_strides: tuple[int, int],
    grad_last: int,
    h: int,
    gates: int,
    weight: int,
    feedback: int,
    h0: int,
    grad_u: int,
    grad_h0: int,
    sizes: tuple[int, int, int],
    inverse: str,
    update: str,
    step: float,
    clip: float,
    reg: float,
    rtol: float,
    threads: int,
) -> tuple[int, int, float] | None: ...
def regularized_solve(
    *,
    double: bool,
    weight: int,
    rhs: int,
    reg: float,
    solved: int,
    failed: int,
    sizes: tuple[int, int, int],
    threads: int,
) -> bool: ...
def regularized_polar(
    *,
    weight: int,
    reg: float,
    polar: int,
    failed: int,
    sizes: tuple[int, int, int],
    threads: int,
) -> bool: ...
def multiply_add_loop(*, double: bool, iterations: int) -> float: ...
def build_info() -> BuildInfo: ...
def isa_levels() -> list[str]: ...
def isa_level() -> str: ...
def set_isa_level(name: str) -> None: ...
