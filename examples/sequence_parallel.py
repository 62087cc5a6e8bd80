"""One long sequence, cut over several processes: states go from each to the next, and all go back at once.

Under ``TargetProp(chunk=C, overlap=K)``, with a chunk for each process, a process needs three things from those after
it: K steps of input, the gradients of the loss in their states, and the displacement that arrives behind them. Of an
inverse in which there is no state a displacement is linear in those gradients. So each process finds by itself what it
sends back, one exchange adds up what arrives from all, and the adjoints of all chunks are swept at the same time. The
gradients are those of one process, to rounding.

    python examples/sequence_parallel.py --ranks 4 --chunk 64 --overlap 0 16
"""

import argparse
import itertools
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional

import tp_kernels as tp

BATCH, WIDTH, DELAY = 8, 4, 3


def data(length: int) -> tuple[Tensor, Tensor]:
    """Input and target, [T, BATCH, WIDTH]: what was read DELAY steps before."""
    x = torch.randn(length, BATCH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, x.roll(DELAY, 0)


def make(rule: tp.TargetProp, hidden: int) -> tuple[tp.nn.RNN, nn.Linear]:
    torch.manual_seed(0)
    layer = tp.nn.RNN(WIDTH, hidden, rule=rule, dtype=torch.float64)
    nn.init.orthogonal_(layer.weight_hh_l0)
    return layer, nn.Linear(hidden, WIDTH, dtype=torch.float64)


class Ring:
    """This process among those that hold a chunk each."""

    def __init__(self, rule: tp.TargetProp) -> None:
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        self.rule, self.chunk, self.overlap = rule, rule.chunk, rule.overlap

    def forward(self, layer: tp.nn.RNN, x: Tensor) -> tuple[Tensor, Tensor]:
        """The states of this chunk, from the last one of the chunk before, and the last one of its own."""
        start = None
        if self.rank > 0:
            start = x.new_empty(1, x.shape[1], layer.hidden_size)
            distributed.recv(start, self.rank - 1)
        h, last = layer(x, start)
        if self.rank < self.ranks - 1:
            distributed.send(last.detach(), self.rank + 1)
        return h, last

    def backward(self, layer: tp.nn.RNN, x: Tensor, h: Tensor, last: Tensor, grad: Tensor) -> None:
        """Of all processes at once. ``grad``: the gradient of the loss in ``h``, of this chunk."""
        carry = self.carry(layer.weight_hh_l0.detach())
        sent = [torch.empty_like(grad[0]) for _ in range(self.ranks)]
        distributed.all_gather(sent, self.sent_back(grad, carry))
        across, arrives = torch.linalg.matrix_power(carry, self.chunk), torch.zeros_like(grad[0])
        for of_rank in reversed(sent[self.rank + 1 :]):
            arrives = of_rank + arrives @ across.mT  # behind the last step of this chunk
        past = torch.linalg.matrix_power(carry, self.chunk - self.overlap)
        behind = self.sent_back(grad[self.overlap :], carry) + arrives @ past.mT
        following = self.from_next((x[: self.overlap], grad[: self.overlap], behind))
        outputs, gradients = [h], [grad]
        if following is not None:
            x_next, grad_next, behind = following
            if self.overlap:  # these steps only bring the adjoint: their parameters' gradients are of the next process
                frozen = {name: parameter.detach() for name, parameter in layer.named_parameters()}
                h_next, last = torch.func.functional_call(layer, frozen, (x_next, last))
                outputs.append(h_next)
                gradients.append(grad_next)
            outputs.append(last)
            gradients.append(behind[None] / self.rule.step)  # a displacement arrives as a gradient would
        torch.autograd.backward(outputs, gradients)

    def carry(self, weight: Tensor) -> Tensor:
        """The matrix that carries a displacement one step back."""
        if self.rule.inverse == "identity":
            return torch.eye(len(weight), dtype=weight.dtype)
        return tp.regularized_inverse(weight, self.rule.reg, power=self.rule.power)

    def sent_back(self, grad: Tensor, carry: Tensor) -> Tensor:
        """What these steps send to the one before the first."""
        displacement = grad.new_zeros(grad.shape[1:])
        for of_step in reversed(grad):
            displacement = (displacement + self.rule.step * of_step) @ carry.mT
        return displacement

    def from_next(self, own: tuple[Tensor, ...]) -> list[Tensor] | None:
        """What the next process has where this one has ``own``; ``None``: there is no next."""
        following = [torch.empty_like(each) for each in own] if self.rank < self.ranks - 1 else None
        exchanges = []
        if self.rank > 0:
            exchanges += [distributed.isend(each.contiguous(), self.rank - 1) for each in own if len(each)]
        exchanges += [distributed.irecv(each, self.rank + 1) for each in following or () if len(each)]
        for exchange in exchanges:
            exchange.wait()
        return following


def train(rule: tp.TargetProp, hidden: int, steps: int, ranks: int) -> tuple[list[float], list[Tensor]]:
    """Losses, and the gradients of the first step: in one process, or in each of those of the group."""
    layer, readout = make(rule, hidden)
    parameters = [*layer.parameters(), *readout.parameters()]
    losses, first = [], []
    ring = Ring(rule) if distributed.is_initialized() else None
    x, target = data(ranks * rule.chunk)
    if ring is not None:
        x, target = (each.chunk(ranks)[ring.rank] for each in (x, target))
    for _ in range(steps):
        if ring is None:
            loss = functional.mse_loss(readout(layer(x)[0]), target)
            loss.backward()
        else:
            h, last = ring.forward(layer, x)
            of_readout = h.detach().requires_grad_()
            loss = functional.mse_loss(readout(of_readout), target) / ranks
            loss.backward()
            ring.backward(layer, x, h, last, of_readout.grad)
            loss = loss.detach()
            for tensor in (loss, *(parameter.grad for parameter in parameters)):
                distributed.all_reduce(tensor)
        losses.append(loss.item())
        first = first or [parameter.grad for parameter in parameters]
        with torch.no_grad():  # without an optimizer, whose import takes as long as torch's
            for parameter in parameters:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    return losses, first


def work(rank: int, folder: str, rules: list[tp.TargetProp], hidden: int, steps: int, ranks: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    torch.save([train(rule, hidden, steps, ranks) for rule in rules], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> list[tuple[list[float], float]]:
    """Of each rule: the losses, and how much gradients of the first step differ from those of one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (2)")
    parser.add_argument("--chunk", type=int, default=64, help="steps of each (64)")
    parser.add_argument("--overlap", type=int, nargs="+", default=[0, 16], help="steps it sweeps of the next (0 16)")
    inverses = ["weight", "identity"]
    parser.add_argument("--inverse", choices=inverses, nargs="+", default=["weight"], help="of the rule (weight)")
    parser.add_argument("--hidden", type=int, default=32, help="hidden size (32)")
    parser.add_argument("--steps", type=int, default=30, help="of the optimizer (30)")
    options = parser.parse_args(arguments)
    for overlap in options.overlap:
        if not 0 <= overlap <= options.chunk:
            parser.error(f"--overlap must be from 0 to --chunk, {options.chunk}: got {overlap}")
    rules = [
        tp.TargetProp(inverse=inverse, chunk=options.chunk, overlap=overlap)
        for inverse, overlap in itertools.product(options.inverse, options.overlap)
    ]
    of_all = options.hidden, options.steps, options.ranks
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, rules, *of_all), nprocs=options.ranks)
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(options.ranks)]
    results = []
    for rule, *of_ranks in zip(rules, *found, strict=True):
        losses, expected = train(rule, *of_all)
        difference = max(
            float((each - other).abs().max())
            for _, tensors in of_ranks
            for each, other in zip(tensors, expected, strict=True)
        )
        print(
            f"inverse={rule.inverse} overlap={rule.overlap}: loss {losses[0]:.6f} at first, {losses[-1]:.6f} after "
            f"{options.steps} steps; gradients of {options.ranks} processes differ by {difference:.1e}"
        )
        assert difference < 1e-12, "they should be the same, to rounding"
        results.append((of_ranks[0][0], difference))
    return results


if __name__ == "__main__":
    main()
