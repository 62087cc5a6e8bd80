"""Fixtures of every test: poisoned memory, a fixed seed, one thread, and back-ends that may be absent."""

import math
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from _cuda import NotBuilt, emulated
from _cuda_device import ON_GPU, emulate

from tp_kernels import _native
from tp_kernels.ops.recurrence.op import backends

REQUIRED = tuple(filter(None, os.environ.get("TPK_REQUIRE_BACKENDS", "").split(",")))


def absent(name: str, reason: str) -> None:
    """Skip, or fail where ``TPK_REQUIRE_BACKENDS`` names this back-end."""
    if name in REQUIRED:
        pytest.fail(f"TPK_REQUIRE_BACKENDS names {name!r}, which cannot run: {reason}")
    pytest.skip(f"back-end {name!r} cannot run: {reason}")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory from ``torch.empty`` is full of NaN, also where native code writes: every element must be written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=("reference", "cpu"))
def backend(request: pytest.FixtureRequest) -> str:
    """Every back-end there is; one that cannot run here is skipped with its reason."""
    ok, reason = backends("rnn").available(request.param)
    if not ok:
        absent(request.param, reason)
    return request.param


@pytest.fixture(params=(torch.float32, torch.float64), ids=("float32", "float64"))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny calls wait for a second thread longer than they compute. A test may set another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpu() -> None:
    """The native CPU back-end must be there."""
    ok, reason = _native.cpu_available()
    if not ok:
        absent("cpu", reason)


@pytest.fixture(scope="session")
def emulated_cuda() -> ModuleType | None:
    """Built once, or not at all; ``None`` on a GPU."""
    if ON_GPU:
        return None
    if "cuda" in REQUIRED:
        absent("cuda", _native.cuda_available()[1] or "this torch can use no CUDA device")
    try:
        return emulated()
    except NotBuilt as reason:
        absent("cuda-emulated", str(reason))


@pytest.fixture
def cuda(emulated_cuda: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA module: on a GPU as it is, else its kernels emulated on the CPU."""
    if emulated_cuda is not None:
        monkeypatch.setattr(_native, "cuda", emulated_cuda)
    emulate()


@pytest.fixture(params=("v4", "v3", "base"))
def isa_level(request: pytest.FixtureRequest, cpu: None) -> Iterator[str]:
    """Every instruction set this machine can run, in use during the test."""
    if request.param not in _native.cpu.isa_levels():
        pytest.skip(f"this machine cannot run instruction set {request.param!r}")
    before = _native.cpu.isa_level()
    _native.cpu.set_isa_level(request.param)
    yield request.param
    _native.cpu.set_isa_level(before)


GUARD = 64
FENCE = 12288.0  # a number in half precision, too


@pytest.fixture
def fences(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Outputs lie between fences; the list collects the whole memory of each."""
    memories: list[torch.Tensor] = []

    def new_empty(self: torch.Tensor, shape: tuple[int, ...] | int, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = (shape,) if isinstance(shape, int) else shape
        memory = torch.full((math.prod(shape) + 2 * GUARD,), FENCE, dtype=dtype or self.dtype, device=self.device)
        memories.append(memory)
        return memory[GUARD:-GUARD].fill_(torch.nan).view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    return memories


def assert_within_fences(memories: list[torch.Tensor]) -> int:
    """How many outputs there were that have elements."""
    for memory in memories:
        assert memory[:GUARD].eq(FENCE).all(), "written before an output"
        assert memory[-GUARD:].eq(FENCE).all(), "written after an output"
        assert memory[GUARD:-GUARD].isfinite().all(), "not all of an output was written"
    return sum(memory.numel() > 2 * GUARD for memory in memories)
