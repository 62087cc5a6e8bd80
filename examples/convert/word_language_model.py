"""A word language model: a two-layer LSTM with dropout, embedding and readout tied, on one long text in pieces."""

from collections.abc import Sequence

import torch
from compare import compare
from torch import Tensor, nn
from torch.nn import functional

WORDS, COLUMNS, LENGTH = 50, 8, 20


def text(length: int) -> Tensor:
    """[length, COLUMNS]: each word depends on the two before, and is a random one at every tenth place or so."""
    numbers = torch.Generator().manual_seed(1)
    words = [torch.randint(WORDS, (COLUMNS,), generator=numbers) for _ in range(2)]
    for _ in range(length - 2):
        random = torch.randint(WORDS, (COLUMNS,), generator=numbers)
        surprise = torch.rand(COLUMNS, generator=numbers) < 0.1
        words.append(torch.where(surprise, random, (3 * words[-1] + words[-2] + 1) % WORDS))
    return torch.stack(words)


class Model(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, hidden)
        self.rnn = nn.LSTM(hidden, hidden, num_layers=2, dropout=0.2)
        self.dropout = nn.Dropout(0.2)
        self.readout = nn.Linear(hidden, WORDS)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.readout.weight = self.embedding.weight

    def forward(self, words: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = self.rnn(self.dropout(self.embedding(words)), state)
        return self.readout(self.dropout(output)), state


def train(model: nn.Module, steps: int) -> list[float]:
    """One piece of the text a step; the state goes on from piece to piece, and gradients end at their border."""
    words = text(steps * LENGTH + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses, state = [], None
    for begin in range(0, steps * LENGTH, LENGTH):
        state = None if state is None else tuple(part.detach() for part in state)
        logits, state = model(words[begin : begin + LENGTH], state)
        loss = functional.cross_entropy(logits.flatten(0, 1), words[begin + 1 : begin + LENGTH + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    return compare(__doc__, Model, train, arguments)


if __name__ == "__main__":
    main()
