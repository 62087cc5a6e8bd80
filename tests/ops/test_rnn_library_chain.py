"""The chain of library products, for what no CUDA kernel here holds: on a GPU, else with its own kernels emulated."""

from collections.abc import Callable

import pytest
import torch
from _cases import LAYOUTS, RNNCase
from _checks import rnn_backward_check, rnn_forward_check
from _compare import assert_near
from _cuda_device import DEVICE, FLOAT, ON_GPU, SWEPT, emulate, everything, in_two_parts, ops
from _oracle import extended

from conftest import assert_within_fences
from tp_kernels import _native, info
from tp_kernels.ops.rnn import library_chain
from tp_kernels.ops.rnn.cuda_paths import LARGEST_ON_ONE, cuda_path
from tp_kernels.rules import Sweep

CASES = (
    RNNCase(T=1, B=1, N=129),
    RNNCase(T=4, B=3, N=130),
    RNNCase(T=3, B=5, N=140, nonlinearity="relu", h0=False),
    RNNCase(T=3, B=2, H=2, N=131),
    RNNCase(T=2, B=0, N=129),
    RNNCase(T=3, B=4, N=132, nonlinearity="identity"),
)
SMALL, HEADS = CASES[1], CASES[3]


pytestmark = pytest.mark.usefixtures("chained")


@pytest.fixture
def chained(cuda: None) -> None:
    """A device without clusters; a GPU that has them takes more units."""
    emulate(largest_cluster=0)
    if ON_GPU and _native.cuda.rnn_cluster_largest(0) > 129:
        pytest.skip("the clusters of this device hold these units")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case):
    rnn_forward_check(case, FLOAT, "cuda", device=DEVICE)


@pytest.mark.parametrize("rule", SWEPT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, rule):
    rnn_backward_check(case, SWEPT[rule], FLOAT, "cuda", device=DEVICE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    for case in (SMALL, HEADS):
        rnn_forward_check(case, FLOAT, "cuda", layout, DEVICE)
        rnn_backward_check(case, SWEPT["layer-total"], FLOAT, "cuda", layout, DEVICE)


@pytest.mark.parametrize("case", [SMALL, HEADS], ids=str)
def test_nothing_is_written_outside_of_the_outputs(case, fences):
    everything(case, SWEPT)
    assert_within_fences([memory for memory in fences if memory.numel()])


@pytest.mark.parametrize("rule", SWEPT)
def test_a_sequence_in_two_parts(rule):
    """State and what goes back handed on: the same up to rounding, which in the library's products may depend on where
    a matrix lies in memory.
    """
    parts = in_two_parts(RNNCase(T=5, B=3, N=130), SWEPT[rule])
    for what, found, expected in zip(("h", "grad_u", "carried", "through"), *parts, strict=True):
        condition = 1 if what == "h" else 10
        assert_near(found.cpu(), extended(expected.cpu()), what, condition=condition)


@pytest.mark.parametrize("case", [SMALL, HEADS, RNNCase(T=3, B=5, N=130, h0=False)], ids=str)
def test_recordings_are_replayed(case, monkeypatch):
    """Copied in, run, copied out: the same as step by step, with new data in an old recording, too. Without a GPU
    what is recorded is run again, on the recording's own tensors.
    """
    recorded = []

    def record(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
        recorded.append(function)
        return function

    def results(seed: int) -> list[torch.Tensor]:
        u, weight, h0 = (None if tensor is None else tensor.to(DEVICE) for tensor in case.tensors(FLOAT, seed))
        h = ops.rnn_fwd(u, weight, h0, "tanh", "cuda")
        found = [h]
        for rule in ("layer-total", "bp"):
            sweep = Sweep.of(SWEPT[rule], "tanh")
            found += ops.rnn_bwd(u, u[0], h, weight, weight.mT, h0, h0, None, None, *sweep, "cuda")
        return found

    monkeypatch.setattr(library_chain, "_recordings", {})
    monkeypatch.setattr(library_chain, "records", lambda device: False)
    expected = [results(seed) for seed in (0, 1)]
    monkeypatch.setattr(library_chain, "records", lambda device: True)
    if not ON_GPU:
        monkeypatch.setattr(library_chain, "record", record)
    for seed in (0, 1, 0):
        for found, wanted in zip(results(seed), expected[seed], strict=True):
            assert_near(found.cpu(), extended(wanted.cpu()), "a result", condition=10)
    assert len(library_chain._recordings) == 3
    assert ON_GPU or len(recorded) == 3
    for T in range(10, 15):
        u, weight, h0 = (tensor.to(DEVICE) for tensor in RNNCase(T=T, B=1, N=129).tensors(FLOAT))
        ops.rnn_fwd(u, weight, h0, "tanh", "cuda")
    assert len(library_chain._recordings) == library_chain.LARGEST_COUNT


def test_path():
    for dtype, largest in LARGEST_ON_ONE.items():
        assert _native.cuda.rnn_largest[str(dtype).removeprefix("torch.")] == largest
        assert cuda_path(largest, dtype, 0).name == "one multiprocessor"
    assert cuda_path(129, FLOAT, 512).name == cuda_path(512, FLOAT, 512).name == "cluster of multiprocessors"
    assert cuda_path(129, FLOAT, 0).name == cuda_path(513, FLOAT, 512).name == "library chain"
    assert cuda_path(257, torch.bfloat16, 1024) is None
    assert cuda_path(1, torch.float64, 1024) is None


def test_info_says_which_path(capsys):
    info.main(["--shape", "N=512,dtype=float32"])
    assert ": library chain: one multiprocessor keeps the weight of up to 128 units, of" in capsys.readouterr().out
    assert info.cuda_path_of("N=100").endswith(
        "N=100: one multiprocessor: it keeps the weight of up to 128 units in its registers"
    )
    assert info.cuda_path_of("N=9,dtype=float64").endswith(": none: it does not compute this dtype")
    assert info.cuda_path_of("N=257,dtype=float16").endswith(": none: it keeps up to 256 units of this dtype")
    for wrong in ("512", "N=0", "N=5,dtype=zeros", "N=5,T=3"):
        with pytest.raises(ValueError, match="info: shape must be like"):
            info.cuda_path_of(wrong)
        with pytest.raises(SystemExit):
            info.main(["--shape", wrong])
