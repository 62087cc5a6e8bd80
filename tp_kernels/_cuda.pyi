"""CUDA kernels. Every function takes addresses: call them through ``tp_kernels``, which checks the tensors."""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    architectures: str

device_type: str
recurrence_largest: dict[str, int]

def recurrence_fwd(
    *,
    dtype: str,
    cell: str,
    input: int,
    input_strides: tuple[int, int, int],
    weight: int,
    start: int,
    h: int,
    sizes: tuple[int, int, int, int],
    tf32: bool,
    device: int,
    stream: int,
) -> None: ...
def recurrence_bwd(
    *,
    dtype: str,
    cell: str,
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
    grad_u: int,
    displacements: int,
    iterations: int,
    missed: int,
    sizes: tuple[int, int, int, int],
    inverse: str,
    update: str,
    step: float,
    clip: float,
    reg: float,
    rtol: float,
    tf32: bool,
    device: int,
    stream: int,
) -> None: ...
def recurrence_needs_displacements(
    *,
    dtype: str,
    sizes: tuple[int, int, int, int],
    inverse: str,
    update: str,
    tf32: bool,
    device: int,
) -> bool: ...
def recurrence_cluster_largest(device: int) -> int: ...
def chain_step(
    *,
    cell: str,
    grad_h: int,
    grad_h_strides: tuple[int, int, int],
    grad_last: int,
    h: int,
    carried_in: int,
    through_in: int,
    carried_out: int,
    grad_u: int,
    sizes: tuple[int, int, int, int],
    inverse: str,
    update: str,
    step: float,
    clip: float,
    device: int,
    stream: int,
) -> None: ...
def chain_activation(*, cell: str, h: int, count: int, device: int, stream: int) -> None: ...
def regularized_solve(
    *,
    double: bool,
    weight: int,
    weight_strides: tuple[int, int, int],
    rhs: int,
    rhs_strides: tuple[int, int, int],
    reg: float,
    reg_on_device: int,
    solved: int,
    failed: int,
    sizes: tuple[int, int, int],
    device: int,
    stream: int,
) -> None: ...
def regularized_polar(
    *,
    double: bool,
    weight: int,
    weight_strides: tuple[int, int, int],
    reg: float,
    reg_on_device: int,
    polar: int,
    scratch: int,
    failed: int,
    sizes: tuple[int, int, int],
    tolerance: float,
    most: int,
    device: int,
    stream: int,
) -> None: ...
def regularized_inverse_largest(*, double: bool, device: int) -> int: ...
def device_problem() -> str: ...
def build_info() -> BuildInfo: ...
