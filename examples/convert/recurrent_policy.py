"""A recurrent policy trained by PPO: episodes end within a rollout, and the state starts anew there.

``torch.nn`` has to be called step by step, with the state masked in between; ours is told by ``reset=``, in one call.
"""

from collections.abc import Sequence

import torch
from compare import compare
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional

import tp_kernels as tp

STEPS, ENVIRONMENTS, EPOCHS = 24, 16, 2


class Recall:
    """Each episode shows a cue, left or right, at its first step; the reward is for naming it at the last."""

    def __init__(self) -> None:
        self.numbers = torch.Generator().manual_seed(1)
        self.cue, self.left = torch.zeros(2, ENVIRONMENTS, dtype=torch.long)

    def observe(self) -> tuple[Tensor, Tensor]:
        """[B, 4]: the cue, whether it is the last step, and one; and which episodes begin, [B]."""
        begins = self.left == 0
        new = torch.randint(2, (2, ENVIRONMENTS), generator=self.numbers)
        self.cue, self.left = torch.where(begins, new[0], self.cue), torch.where(begins, 3 + 2 * new[1], self.left)
        shown = functional.one_hot(self.cue, 2) * begins[:, None]
        return torch.cat((shown, (self.left == 1)[:, None], torch.ones(ENVIRONMENTS, 1)), -1), begins

    def act(self, action: Tensor) -> Tensor:
        """The rewards, [B]."""
        self.left = self.left - 1
        return ((action == self.cue) & (self.left == 0)).float()


class Model(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, hidden)
        self.head = nn.Linear(hidden, 3)  # logits of two actions, and the value

    def forward(self, x: Tensor, state: Tensor, begins: Tensor) -> tuple[Categorical, Tensor, Tensor]:
        if isinstance(self.rnn, tp.nn.GRU):
            output, state = self.rnn(x, state, reset=begins)
        else:
            outputs = []
            for each, begin in zip(x, begins, strict=True):
                output, state = self.rnn(each[None], state * ~begin[:, None])
                outputs.append(output)
            output = torch.cat(outputs)
        *logits, value = self.head(output).unbind(-1)
        return Categorical(logits=torch.stack(logits, -1)), value, state


@torch.no_grad()
def rollout(model: nn.Module, environment: Recall, state: Tensor) -> tuple[list[Tensor], Tensor]:
    """Observations, beginnings, actions, their log-probabilities, values and rewards, [T, B] each; the last state."""
    steps = []
    for _ in range(STEPS):
        x, begins = environment.observe()
        policy, value, state = model(x[None], state, begins[None])
        action = policy.sample()
        steps.append((x, begins, action[0], policy.log_prob(action)[0], value[0], environment.act(action[0])))
    return [torch.stack(each) for each in zip(*steps, strict=True)], state


def train(model: nn.Module, steps: int) -> list[float]:
    environment, state = Recall(), torch.zeros(1, ENVIRONMENTS, model.rnn.hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        first = state
        (x, begins, action, log_prob, value, reward), state = rollout(model, environment, first)
        returns = reward.clone()
        for t in range(STEPS - 2, -1, -1):
            returns[t] += 0.95 * returns[t + 1] * ~begins[t + 1]
        advantage = returns - value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-3)
        for _ in range(EPOCHS):
            policy, value, _ = model(x, first, begins)
            ratio = (policy.log_prob(action) - log_prob).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
            loss = functional.mse_loss(value, returns) - gain - 0.01 * policy.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    return compare(__doc__, Model, train, arguments)


if __name__ == "__main__":
    main()
