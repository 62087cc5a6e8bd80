"""``gru`` in plain PyTorch, one step at a time: the specification that the native back-end is checked against."""

import torch
from torch import Tensor

from tp_kernels.ops.rnn.reference import check_residuals, regularized_term
from tp_kernels.rules import Sweep


def forward(u: Tensor, weight: Tensor, bias: Tensor | None, h0: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """States ``h_t = (1 - z) n + z h_{t-1}`` with ``r, z = σ(u + W h_{t-1})``, ``n = tanh(u_n + r q)`` and
    ``q = W_n h_{t-1} + b``.

    Args:
        u: [T, B, 3N], the input's share of r, z and n, any floating dtype, any strides.
        weight: [3N, N], W_r, W_z and W_n.
        bias: [N], b; ``None`` is zero.
        h0: [B, N]; ``None`` is zero.
        keep: whether backward will need the gates.

    Returns:
        h: [T, B, N], and the gates r, z, n and q of every step: [T, B, 4, N], or empty. Both contiguous.
    """
    T, B, N = u.shape[0], u.shape[1], weight.shape[1]
    h, gates = u.new_empty((T, B, N)), u.new_empty((T, B, 4, N) if keep else (0,))
    state = u.new_zeros((B, N)) if h0 is None else h0
    for t in range(T):
        product = state @ weight.mT
        r, z = (u[t, :, : 2 * N] + product[:, : 2 * N]).sigmoid().chunk(2, dim=-1)
        q = product[:, 2 * N :] if bias is None else product[:, 2 * N :] + bias
        n = torch.tanh(u[t, :, 2 * N :] + r * q)
        state = n + z * (state - n)
        h[t] = state
        if keep:
            gates[t] = torch.stack((r, z, n, q), dim=1)
    return h, gates


def backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    h: Tensor,
    gates: Tensor,
    weight: Tensor,
    feedback: Tensor | None,
    h0: Tensor | None,
    sweep: Sweep,
) -> tuple[Tensor, Tensor]:
    """Displacements λ, adjoints μ and gradients of the pre-activations, from the last step to the first.

    ``λ_{t-1} = step g_{t-1} + term(λ_t)``; the term is 0 ("none"), λ_t ("identity"),
    ``z λ_t + √(1-z) P_n (√(1-z) r λ_t)`` ("weight"),
    ``z λ_t + P_z ((h_{t-1} - n) λ_t / (z(1-z))) + P_r (q s / (r(1-r))) + P_n (r s)`` with ``s = (1-n²)(1-z) λ_t`` and r
    and z clipped to [clip, 1 - clip] ("layer"), or ``(JᵀJ + rI)⁻¹ Jᵀ λ_t`` with ``J = ∂h_t/∂h_{t-1}`` ("jacobian").
    ``μ_t = λ_t`` (``update="local"``) or ``μ_t = λ_t + Jᵀ_{t+1} μ_{t+1}`` ("total"). Back-propagation is "none" with
    "total".

    Args:
        grad_h: like ``h``, ∂loss/∂h; ``None`` is zero.
        grad_last: [B, N], added to the gradient of the last state; ``None`` is zero.
        h, gates: of ``forward``.
        weight: [3N, N], W.
        feedback: P_n, [N, N], for "weight"; P_r, P_z and P_n, [3, N, N], for "layer".
        h0: like ``h[0]``; ``None`` is zero.
        sweep: the rule.

    Returns:
        The gradients in u: [T, B, 3N], contiguous, and in the first state: [B, N].

    Raises:
        torch.linalg.LinAlgError: after the sweep, a solve of "jacobian" has a relative residual above rtol.
    """
    T, B, N = h.shape
    total, blocks = sweep.update == "total", weight.unflatten(0, (3, N))
    grad_u, zero = h.new_empty((T, B, 3 * N)), torch.zeros_like(h[0])
    carried, through, residuals = zero, zero, []
    for t in range(T - 1, -1, -1):
        r, z, n, q = gates[t].unbind(dim=1)
        before = h[t - 1] if t else zero if h0 is None else h0
        displacement = carried
        if grad_h is not None:
            displacement = displacement + sweep.step * grad_h[t]
        if grad_last is not None and t == T - 1:
            displacement = displacement + sweep.step * grad_last
        slopes = _slopes(r, z, n, q, before)
        adjoint = displacement + through
        delta = [slope * adjoint for slope in slopes]
        grad_u[t] = torch.cat((*delta[:2], (1 - z) * (1 - n.square()) * adjoint), dim=-1)
        if sweep.inverse == "identity":
            carried = displacement
        elif sweep.inverse == "weight":
            root = (1 - z).sqrt()
            carried = z * displacement + root * ((root * r * displacement) @ feedback.mT)
        elif sweep.inverse == "layer":
            carried = _layer_term(displacement, r, z, n, q, before, feedback, sweep.clip)
        elif sweep.inverse == "jacobian":
            wide = [tensor.to(torch.promote_types(h.dtype, torch.float32)) for tensor in (z, *slopes, *blocks)]
            jacobian = torch.diag_embed(wide[0])
            for slope, block in zip(wide[1:4], wide[4:], strict=True):
                jacobian = jacobian + slope[..., None] * block
            carried, residual = regularized_term(jacobian, displacement, sweep.reg)
            residuals.append(residual)
        if total:
            through = z * adjoint + torch.cat(delta, dim=-1) @ weight
    if residuals:
        check_residuals(torch.stack(residuals[::-1]), sweep, h.dtype, "gru")
    return grad_u, (through if total else carried).clone(memory_format=torch.contiguous_format)


def _slopes(r: Tensor, z: Tensor, n: Tensor, q: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a state in ``W_r h``, ``W_z h`` and ``W_n h`` of the state before: ``J = diag(z) + Σ diag(slope) W``."""
    inner = (1 - z) * (1 - n.square())
    return inner * q * r * (1 - r), (before - n) * z * (1 - z), inner * r


def _layer_term(
    displacement: Tensor, r: Tensor, z: Tensor, n: Tensor, q: Tensor, before: Tensor, feedback: Tensor, clip: float
) -> Tensor:
    r, z = r.clamp(clip, 1 - clip), z.clamp(clip, 1 - clip)
    inner = (1 - z) * (1 - n.square()) * displacement
    sent = (q * inner / (r * (1 - r)), (before - n) * displacement / (z * (1 - z)), r * inner)
    return z * displacement + sum(part @ inverse.mT for part, inverse in zip(sent, feedback, strict=True))
