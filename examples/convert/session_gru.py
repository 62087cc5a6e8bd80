"""Session-based recommendation (GRU4Rec): a place of the batch takes the next session when one ends, and starts anew.

``torch.nn.GRUCell`` is given a masked state there; ours is told by ``reset=``, and the state stays as it came.
"""

from collections.abc import Iterator, Sequence

import torch
from compare import compare
from torch import Tensor, nn
from torch.nn import functional

import tp_kernels as tp

ITEMS, PLACES, LENGTH = 40, 16, 10


class Model(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ITEMS, hidden)
        self.cell = nn.GRUCell(hidden, hidden)
        self.scores = nn.Linear(hidden, ITEMS)

    def forward(self, items: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of every item to be the next, and the state."""
        x = self.embedding(items)
        if isinstance(self.cell, tp.nn.GRUCell):
            state = self.cell(x, state, reset=begins)
        else:
            state = self.cell(x, state * ~begins[:, None])
        return self.scores(state), state


def sessions() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Step by step the items looked at, those looked at next, and where a session begins, [PLACES] each. Within a
    session, of 2 to 8 items, one goes on by a stride of its own.
    """
    numbers = torch.Generator().manual_seed(1)
    item, stride, left = torch.zeros(3, PLACES, dtype=torch.long)
    while True:
        begins = left == 0
        fresh = [torch.randint(high, (PLACES,), generator=numbers) for high in (ITEMS, 3, 7)]
        item, stride = torch.where(begins, fresh[0], item), torch.where(begins, 1 + fresh[1], stride)
        left = torch.where(begins, 1 + fresh[2], left) - 1
        following = (item + stride) % ITEMS
        yield item, following, begins
        item = following


def ranking_loss(scores: Tensor, following: Tensor) -> Tensor:
    """BPR: the item that came next is scored above those that came next in the other places."""
    of_all = scores[:, following]
    return -functional.logsigmoid(of_all.diagonal()[:, None] - of_all).mean()


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    stream, state = sessions(), torch.zeros(PLACES, model.cell.hidden_size)
    losses = []
    for _ in range(steps):
        loss, state = 0.0, state.detach()
        for _ in range(LENGTH):
            items, following, begins = next(stream)
            scores, state = model(items, state, begins)
            loss = loss + ranking_loss(scores, following) / LENGTH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    return compare(__doc__, Model, train, arguments)


if __name__ == "__main__":
    main()
