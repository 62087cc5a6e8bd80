"""A character model: a GRU called once for every character, as tutorials do. It writes a line at the end."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from compare import compare
from torch import Tensor, nn
from torch.nn import functional

SENTENCES = ("the cat sees the dog. ", "a dog hears the bird. ", "the bird sings. ", "a cat sleeps. ")
LETTERS = sorted(set("".join(SENTENCES)))
LENGTH, BATCH = 25, 8


class Model(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), hidden)
        self.rnn = nn.GRU(hidden, hidden)
        self.readout = nn.Linear(hidden, len(LETTERS))

    def forward(self, letters: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of one character of every text, [B]: the logits of the next, and the state to go on from."""
        output, state = self.rnn(self.embedding(letters)[None], state)
        return self.readout(output[0]), state


def batch(numbers: torch.Generator) -> Tensor:
    """[LENGTH + 1, BATCH] characters of random sentences."""
    columns = []
    for _ in range(BATCH):
        order = torch.randint(len(SENTENCES), (4,), generator=numbers)
        columns.append([LETTERS.index(letter) for letter in "".join(SENTENCES[i] for i in order)[: LENGTH + 1]])
    return torch.tensor(columns).T


def train(model: nn.Module, steps: int) -> list[float]:
    numbers = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        text, state, loss = batch(numbers), None, 0.0
        for letters, following in pairwise(text):
            logits, state = model(letters, state)
            loss = loss + functional.cross_entropy(logits, following) / LENGTH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(write(model))
    return losses


@torch.no_grad()
def write(model: nn.Module, length: int = 60) -> str:
    """The most probable text after a "t"."""
    letter, state, text = torch.tensor([LETTERS.index("t")]), None, "t"
    for _ in range(length):
        logits, state = model(letter, state)
        letter = logits.argmax(-1)
        text += LETTERS[int(letter)]
    return text


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    return compare(__doc__, Model, train, arguments)


if __name__ == "__main__":
    main()
