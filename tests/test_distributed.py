"""Data-parallel training: two processes, each with half of the batch, have the gradients of one with all of it."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

import tp_kernels as tp
from tp_kernels.rules import Rule

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

RANKS, STEPS, T, B, M, N = 2, 2, 6, 4, 3, 5


class Model(nn.Module):
    """A layer, called once or more often, each time from the state that it returned, and a readout."""

    def __init__(self, layer: nn.Module, calls: int) -> None:
        super().__init__()
        self.layer, self.calls = layer, calls
        self.readout = nn.Linear(N, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = [], None
        for piece in x.chunk(self.calls):
            output, state = self.layer(piece, state)
            outputs.append(output)
        return self.readout(torch.cat(outputs))


MODELS: dict[str, tuple[type[nn.Module], int, Rule]] = {
    "RNN": (tp.nn.RNN, 1, tp.TargetProp()),
    "LSTM": (tp.nn.LSTM, 2, tp.TargetProp(inverse="identity")),
}


def make(name: str, rule: Rule | None = None, calls: int = 1) -> Model:
    layer, num_layers, own = MODELS[name]
    torch.manual_seed(0)
    return Model(layer(M, N, num_layers, rule=rule or own, dtype=torch.float64), calls)


def batches() -> list[Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return [torch.randn(T, B, M, dtype=torch.float64, generator=numbers) for _ in range(STEPS)]


def train(model: nn.Module, part: slice) -> list[Tensor]:
    """On the sequences of that part of each batch: the gradients of every step, and the parameters at the end."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for x in batches():
        optimizer.zero_grad()
        model(x[:, part]).square().mean().backward()
        found += [whole(parameter.grad).clone() for parameter in model.parameters()]
        optimizer.step()
    return found + [whole(parameter).clone() for parameter in model.parameters()]


def whole(tensor: Tensor) -> Tensor:
    """Of which each process may have a part."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def data_parallel(model: Model) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: Model) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))


def layer_sharded(model: Model) -> nn.Module:
    """The layer by itself, and the rest."""
    fully_shard(model.layer, mesh=init_device_mesh("cpu", (RANKS,)))
    return sharded(model)


WAYS: dict[str, tuple[Callable[[Model], nn.Module], int]] = {
    "DDP": (data_parallel, 2),
    "FSDP2": (sharded, 2),
    "FSDP2 of the layer": (layer_sharded, 1),  # it copies a state that is handed on
}


def work(rank: int, folder: str) -> None:
    """Of one process: trains every model every way, and saves what it found."""
    warnings.filterwarnings("error", message=".*no displacement goes back", category=UserWarning)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    share = B // RANKS
    part, found = slice(rank * share, (rank + 1) * share), {}
    for way, (wrap, calls) in WAYS.items():
        for name in MODELS:
            found[way, name] = train(wrap(make(name, calls=calls)), part)
    with pytest.raises(UserWarning, match="or by a hook or wrapper of the layer"):
        train(layer_sharded(make("RNN", calls=2)), part)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], list[Tensor]]]:
    """Of each process: processes take seconds to start, so they do all at once."""
    folder: Path = tmp_path_factory.mktemp("distributed")
    multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(way, name, found):
    expected = train(make(name, calls=WAYS[way][1]), slice(None))
    for of_rank in found:
        torch.testing.assert_close(of_rank[way, name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_the_rule_matters(name):
    """Else two processes could both back-propagate."""
    ruled, plain = train(make(name), slice(None)), train(make(name, tp.BackProp()), slice(None))
    assert (ruled[0] - plain[0]).abs().max() > 1e-6
