"""The chain of library products, for what no CUDA kernel here holds: on a GPU, else with its own kernels emulated."""

import contextlib
import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from _cases import LAYOUTS, Case, Inputs
from _checks import Back, backward_check, capture_check, forward_check, forward_op, stream_check
from _compare import assert_near
from _cuda_device import DEVICE, FLOAT, ON_GPU, SWEPT, emulate, everything, in_two_parts, inputs_of, needs_gpu
from _oracle import extended

import tp_kernels as tp
from conftest import assert_within_fences
from tp_kernels import _native, info
from tp_kernels.ops.recurrence import library_chain
from tp_kernels.ops.recurrence.cuda import LARGEST_ON_ONE, cuda_path
from tp_kernels.rules import Sweep

CASES = (
    Case(T=1, B=1, N=129),
    Case(T=4, B=3, N=130),
    Case(T=3, B=5, N=140, cell="rnn_relu", h0=False),
    Case(T=3, B=2, H=2, N=131),
    Case(T=2, B=0, N=129),
    Case(T=3, B=4, N=132, cell="rnn_identity"),
)
SMALL, HEADS = CASES[1], CASES[3]


pytestmark = pytest.mark.usefixtures("chained")


@pytest.fixture
def chained(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without clusters; one that has them is not asked."""
    emulate(largest_cluster=0)
    if ON_GPU:
        monkeypatch.setattr(_native.cuda, "recurrence_cluster_largest", lambda device: 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case):
    forward_check(case, FLOAT, "cuda", device=DEVICE)


@pytest.mark.parametrize("rule", SWEPT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, rule):
    backward_check(case, SWEPT[rule], FLOAT, "cuda", device=DEVICE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    for case in (SMALL, HEADS):
        forward_check(case, FLOAT, "cuda", layout, DEVICE)
        backward_check(case, SWEPT["layer-total"], FLOAT, "cuda", layout, DEVICE)


@pytest.mark.parametrize("case", [SMALL, HEADS], ids=str)
def test_nothing_is_written_outside_of_the_outputs(case, fences):
    everything(case, SWEPT)
    assert_within_fences([memory for memory in fences if memory.numel()])


@pytest.mark.parametrize("rule", SWEPT)
def test_a_sequence_in_two_parts(rule):
    """State and what goes back handed on: the same up to rounding, which in the library's products may depend on where
    a matrix lies in memory.
    """
    found, expected = in_two_parts(Case(T=5, B=3, N=130), SWEPT[rule])
    for what, tensor in found.items():
        assert_near(tensor.cpu(), extended(expected[what].cpu()), what, condition=1 if what == "h" else 10)


# --- recordings


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been called before."""
    monkeypatch.setattr(library_chain, "_recordings", {})
    monkeypatch.setattr(library_chain, "_came_once", {})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places of recordings, as they are made. Without a GPU what is recorded is run again, on the recording's own
    tensors.
    """
    places = []
    made = library_chain.record

    def record(function: Callable[[], None], device: torch.device, place: int) -> Callable[[], None]:
        places.append(place)
        return made(function, device, place) if ON_GPU else function

    forget(monkeypatch)
    monkeypatch.setattr(library_chain, "records", lambda device: True)
    monkeypatch.setattr(library_chain, "record", record)
    return places


def run_forward(case: Case, times: int = 1) -> torch.Tensor:
    inputs = inputs_of(case)
    for _ in range(times):
        h = forward_op(case.cell, *inputs, backend="cuda")[0]
    return h


@pytest.mark.parametrize("case", [SMALL, HEADS, Case(T=3, B=5, N=130, h0=False)], ids=str)
def test_recordings_are_replayed(case, recorded, monkeypatch):
    """Copied in, run, copied out: the same as step by step, with new data in an old recording, too."""

    def results(seed: int) -> list[torch.Tensor]:
        inputs = Inputs(*(None if tensor is None else tensor.to(DEVICE) for tensor in case.tensors(FLOAT, seed)))
        u, weight, _, h0 = inputs
        h = forward_op(case.cell, *inputs, backend="cuda").h
        back = Back(case.cell, h, weight, grad=u, last=u[0], feedback=weight.mT, carried=h0, through=h0)
        runs = [back.run(Sweep.of(SWEPT[rule]), "cuda") for rule in ("layer-total", "bp")]
        return [h, *(tensor for run in runs for tensor in run.swept.values())]

    with monkeypatch.context() as step_by_step:
        step_by_step.setattr(library_chain, "records", lambda device: False)
        expected = [results(seed) for seed in (0, 1)]
    assert not recorded
    for call, seed in enumerate((0, 1, 0)):
        assert len(recorded) == (0 if call < 2 else 3)
        for found, wanted in zip(results(seed), expected[seed], strict=True):
            assert_near(found.cpu(), extended(wanted.cpu()), "a result", condition=10)
    assert recorded == [0, 1, 2]


def test_few_recordings_are_kept(recorded, monkeypatch):
    """The latest, each with a place, and so a stream, that no other has."""
    monkeypatch.setattr(library_chain, "LARGEST_COUNT", 4)
    for T in (2, 3, 4, 5, 2, 6, 7):
        run_forward(SMALL.with_(T=T), times=2)
    assert recorded == [0, 1, 2, 3, 1, 2]
    kept = list(library_chain._recordings.values())
    assert [recording.results[0].shape[0] for recording in kept] == [5, 2, 6, 7]
    assert sorted(recording.place for recording in kept) == list(range(library_chain.LARGEST_COUNT))
    if ON_GPU:
        streams = library_chain._streams(kept[0].results[0].device)
        assert len({stream.cuda_stream for stream in streams}) == len(streams)


def test_a_recording_belongs_to_a_precision(recorded, monkeypatch):
    """The library's products in it are of the precision that was set when it was made."""
    for tf32 in (False, True, False):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
        run_forward(SMALL, times=2)
    assert recorded == [0, 1]


def test_nothing_is_recorded_for_no_rows(recorded):
    run_forward(SMALL.with_(B=0), times=3)
    assert not recorded


def test_what_comes_once_is_not_recorded(recorded, monkeypatch):
    """Lengths that change all the time are run step by step, and so are more of them in turn than are kept."""
    monkeypatch.setattr(library_chain, "LARGEST_COUNT", 2)
    for T in (2, 3, 4, 2, 3, 4):
        run_forward(SMALL.with_(T=T))
    assert not recorded
    assert len(library_chain._came_once) == 2
    run_forward(SMALL.with_(T=3))
    assert recorded == [0]
    assert len(library_chain._came_once) == 1


def test_how_a_recording_is_made(monkeypatch):
    """By a runtime that writes down what it is asked: warmed up on a stream that is never recorded on, in a pool of its
    place that lives for ever; no cache is emptied.
    """
    written: list[object] = []
    on = ["the caller's"]

    @contextlib.contextmanager
    def stream(name: str):
        on.append(name)
        yield
        on.pop()

    class Graph:
        def capture_begin(self, pool: str, capture_error_mode: str) -> None:
            written.append(("begin", on[-1], pool, capture_error_mode))

        def capture_end(self) -> None:
            written.append(("end", on[-1]))

        def replay(self) -> None:
            written.append("replay")

    def waits(stream: str) -> None:
        written.append((on[-1], "waits for", stream))

    names = (f"stream {i}" for i in range(100))
    pools = (SimpleNamespace(id=f"pool {i}") for i in range(100))
    fake = {
        "device": lambda device: contextlib.nullcontext(),
        "stream": stream,
        "Stream": lambda device: next(names),
        "MemPool": lambda: next(pools),
        "CUDAGraph": Graph,
        "current_stream": lambda: SimpleNamespace(wait_stream=waits),
        "synchronize": lambda: written.append("synchronize"),
        "empty_cache": lambda: written.append("empty_cache"),
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    device = torch.device("cuda", 99)  # nobody has made its streams yet
    for place in (3, 1, 3):
        replay = library_chain.record(lambda: written.append(("run", on[-1])), device, place)
        *prepared, begin, run, end = written
        (_, warm_up), place_stream = prepared[1], begin[1]
        assert prepared == ["synchronize", ("run", warm_up), ("the caller's", "waits for", warm_up)]
        assert warm_up not in ("the caller's", *library_chain._streams(device))
        assert place_stream == library_chain._streams(device)[place]
        assert begin == ("begin", place_stream, library_chain._pools(device)[place].id, "thread_local")
        assert (run, end) == (("run", place_stream), ("end", place_stream))
        written.clear()
        replay()
        assert written == ["replay"]
        written.clear()
    assert len({pool.id for pool in library_chain._pools(device)}) == library_chain.LARGEST_COUNT

    def fails_in_the_recording() -> None:
        if written[-1] != "synchronize":
            raise RuntimeError("of the library")

    with pytest.raises(RuntimeError, match="of the library"):
        library_chain.record(fails_in_the_recording, device, 0)
    assert written[-1] == ("end", library_chain._streams(device)[0])  # else every later call there would fail


def test_where_nothing_is_recorded(monkeypatch):
    """Off CUDA, in a recording, and where torch.compile is about to make one: on the stream of its graph trees."""
    device, streams = torch.device("cuda", 0), {"current": "a", "trees": "b"}
    manager = SimpleNamespace(stream="b")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["current"])
    name = "torch._inductor.cudagraph_trees"
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert library_chain.records(device)
    assert not library_chain.records(torch.device("cpu"))
    for found, stream, expected in ((None, "b", True), (manager, "a", True), (manager, "b", False)):
        trees = SimpleNamespace(get_manager=lambda index, create_if_none_exists, found=found: found)
        monkeypatch.setitem(sys.modules, name, trees)
        streams["current"] = stream
        assert library_chain.records(device) is expected
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    streams["current"] = "a"
    assert not library_chain.records(device)


def test_graph_trees_are_as_they_were():
    """What is asked of a module of torch that promises nothing."""
    from torch._inductor import cudagraph_trees

    assert list(inspect.signature(cudagraph_trees.get_manager).parameters) == ["device_index", "create_if_none_exists"]
    assert "self.stream = torch.cuda.Stream()" in inspect.getsource(cudagraph_trees.CUDAGraphTreeManager.__init__)
    assert cudagraph_trees.get_manager(0, create_if_none_exists=False) is None


@needs_gpu
def test_a_recording_owns_its_memory(monkeypatch):
    """What torch frees of the library's workspaces and of its cache is none of it."""
    forget(monkeypatch)
    expected = run_forward(SMALL)
    with monkeypatch.context() as full:
        full.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("it empties the cache"))
        run_forward(SMALL)
    assert len(library_chain._recordings) == 1
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((1 << 20,), torch.nan, device=DEVICE) for _ in range(64)]
    assert_near(run_forward(SMALL).cpu(), extended(expected.cpu()), "h")
    assert all(other.isnan().all() for other in others)


@needs_gpu
def test_in_a_recording_of_the_callers_own(monkeypatch):
    """There the chain runs as it is; its own recordings have other streams than the caller's."""
    forget(monkeypatch)
    capture_check(SMALL, "cuda")
    assert not library_chain._recordings  # two passes before and after it, on two streams: nothing has come twice
    capture_check(SMALL, "cuda")
    assert len(library_chain._recordings) == 2  # of the two passes on the current stream


@needs_gpu
def test_under_reduce_overhead(monkeypatch):
    """torch.compile makes the recordings there."""
    forget(monkeypatch)
    u, weight, h0 = (tensor.to(DEVICE).requires_grad_() for tensor in SMALL.tensors(FLOAT))

    def step(u: torch.Tensor, weight: torch.Tensor, h0: torch.Tensor) -> torch.Tensor:
        return tp.rnn(2 * u, weight, h0, backend="cuda").square().sum()

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = torch.autograd.grad(compiled(u, weight, h0), (u, weight, h0))
        found = [gradient.clone() for gradient in found]
    assert not library_chain._recordings
    expected = torch.autograd.grad(step(u, weight, h0), (u, weight, h0))
    for pair in zip(found, expected, strict=True):
        assert_near(pair[0].cpu(), extended(pair[1].cpu()), "a gradient", condition=10)


@needs_gpu
def test_on_another_stream():
    stream_check(SMALL, "cuda")


# --- which path


def test_path():
    for dtype, largest in LARGEST_ON_ONE.items():
        assert _native.cuda.recurrence_largest[str(dtype).removeprefix("torch.")] == largest
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
