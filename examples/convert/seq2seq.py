"""Sequence to sequence: a bidirectional encoder over packed input; a decoder with attention spells it backwards.

The encoder's last state, of two directions, is handed as it came to a decoder of two layers: so displacements go back
from the decoder to the encoder. A sum or a projection of the two would be another state, which they do not pass.
"""

from collections.abc import Sequence

import torch
from compare import compare
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

DIGITS, LENGTH, BATCH = 10, 8, 16
PAD, BEGIN = DIGITS, DIGITS + 1


class Model(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(DIGITS + 2, hidden)
        self.encoder = nn.GRU(hidden, hidden, bidirectional=True)
        self.keys = nn.Linear(2 * hidden, hidden)
        self.decoder = nn.GRU(3 * hidden, hidden, num_layers=2)
        self.readout = nn.Linear(3 * hidden, DIGITS)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Logits, [T, B, DIGITS]. The decoder is told the right digit before each."""
        packed = pack_padded_sequence(self.embedding(source), lengths, enforce_sorted=False)
        output, state = self.encoder(packed)
        memory = pad_packed_sequence(output, total_length=len(source))[0].transpose(0, 1)  # [B, T, 2 N]
        keys, padding = self.keys(memory), (source == PAD).T
        context, logits = memory.new_zeros(memory.shape[::2]), []
        for digit in torch.cat((torch.full_like(target[:1], BEGIN), target[:-1])):
            output, state = self.decoder(torch.cat((self.embedding(digit), context), -1)[None], state)
            scores = (keys @ output[0, :, :, None])[..., 0].masked_fill(padding, -torch.inf)
            context = (scores.softmax(-1)[:, None] @ memory)[:, 0]
            logits.append(self.readout(torch.cat((output[0], context), -1)))
        return torch.stack(logits)


def batch(numbers: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Source and target, [LENGTH, BATCH], and the lengths."""
    lengths = torch.randint(2, LENGTH + 1, (BATCH,), generator=numbers)
    columns = [torch.randint(DIGITS, (int(length),), generator=numbers) for length in lengths]
    source, target = torch.full((2, LENGTH, BATCH), PAD)
    for b, column in enumerate(columns):
        source[: len(column), b], target[: len(column), b] = column, column.flip(0)
    return source, lengths, target


def train(model: nn.Module, steps: int) -> list[float]:
    numbers = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        source, lengths, target = batch(numbers)
        logits = model(source, lengths, target)
        loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    return compare(__doc__, Model, train, arguments)


if __name__ == "__main__":
    main()
