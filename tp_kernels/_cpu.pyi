"""CPU kernels. Every function takes addresses: call them through ``tp_kernels``, which checks and keeps the tensors."""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    flags: str
    openmp: bool

def recurrence_fwd(
    *,
    double: bool,
    cell: str,
    input: int,
    input_strides: tuple[int, int, int],
    projection: int,
    projected: int,
    input_bias: int,
    weight: int,
    bias: int,
    start: int,
    h: int,
    kept: int,
    sizes: tuple[int, int, int, int],
    threads: int,
) -> None: ...
def recurrence_bwd(
    *,
    double: bool,
    cell: str,
    grad_h: int,
    grad_h_strides: tuple[int, int, int],
    grad_last: int,
    h: int,
    kept: int,
    weight: int,
    feedback: int,
    carried_in: int,
    through_in: int,
    carried_out: int,
    through_out: int,
    u: int,
    u_strides: tuple[int, int, int],
    start: int,
    grad_u: int,
    iterations: int,
    sizes: tuple[int, int, int, int],
    inverse: str,
    update: str,
    step: float,
    clip: float,
    reg: float,
    rtol: float,
    first: int,
    threads: int,
) -> tuple[int, int, int, float] | None: ...
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
