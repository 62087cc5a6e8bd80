"""What the tests of modules share."""

import torch
from torch import Tensor, nn


def run(module: nn.Module, x: Tensor, h0: Tensor | None, grad: Tensor, grad_last: Tensor) -> dict[str, Tensor]:
    """Outputs and all gradients, from gradients that arrive at both outputs."""
    leaves = {"grad_x": x.clone().requires_grad_()}
    if h0 is not None:
        leaves["grad_h0"] = h0.clone().requires_grad_()
    output, last = module(*leaves.values())
    leaves |= {f"grad_{name}": parameter for name, parameter in module.named_parameters()}
    grads = torch.autograd.grad((output, last), list(leaves.values()), (grad, grad_last))
    return {"output": output.detach(), "last": last.detach(), **dict(zip(leaves, grads, strict=True))}
