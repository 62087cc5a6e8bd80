"""Ctrl-C during a native call: it is heard at once, and what comes after it is right."""

import signal
import subprocess
import sys
import time

import pytest

# Calls of a minute and more, one thread or several, in memory that is hardly touched until the signal comes.
PROGRAM = """
import torch
import tp_kernels as tp
from tp_kernels import _native
from tp_kernels.ops.recurrence import cpu
from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.rules import Sweep, TargetProp

torch.set_num_threads({threads})
T, B, N = {T}, {B}, {N}


def forward(cell):
    gates = CELLS[cell].gates
    u, weight = torch.zeros(1, 1, gates * N).expand(T, B, -1), torch.zeros(gates * N, N)
    cpu.forward(CELLS[cell], u, weight, None, None, keep=False)


def backward(rule):
    h, grad = torch.zeros(T, B, N), torch.ones(1, 1, 1).expand(T, B, N).contiguous()
    square, nothing = torch.zeros(N, N), dict.fromkeys(("kept", "carried", "through", "u", "start"))
    sweep = Sweep.of(rule)
    cpu.backward(CELLS["rnn_tanh"], sweep, grad_h=grad, grad_last=None, h=h, weight=square, feedback=square, **nothing)


def inverse(function, **options):
    weight, result, failed = torch.zeros(B, N, N), torch.empty(B, N, N), torch.empty(B, dtype=torch.bool)
    names = {{"weight": weight.data_ptr(), "failed": failed.data_ptr(), "sizes": (B, N, N), "threads": {threads}}}
    names |= {{"solved": result.data_ptr(), "rhs": 0, "double": False}} if function == "regularized_solve" else {{}}
    names |= {{"polar": result.data_ptr()}} if function == "regularized_polar" else {{}}
    getattr(_native.cpu, function)(reg=1e-4, **names)


print("calls", flush=True)
try:
    {call}
except KeyboardInterrupt:
    print("heard", flush=True)
x, weight = torch.randn(9, 5, 7), torch.randn(7, 7) / 3
found, expected = (tp.rnn(x, weight, backend=name) for name in ("cpu", "reference"))
torch.testing.assert_close(found, expected)
found, expected = (tp.regularized_inverse(weight, 0.25, backend=name) for name in ("cpu", "reference"))
torch.testing.assert_close(found, expected)
print("right")
"""

CALLS = {
    "forward": ("forward('rnn_tanh')", 1, {"T": 20000, "B": 4, "N": 3000}),
    "forward-threads": ("forward('gru')", 3, {"T": 1000, "B": 200, "N": 2000}),
    "backward": ("backward(TargetProp())", 1, {"T": 10000, "B": 4, "N": 3000}),
    "backward-jacobian": ("backward(TargetProp(inverse='jacobian'))", 3, {"T": 10000, "B": 4, "N": 3000}),
    "solve": ("inverse('regularized_solve')", 1, {"T": 0, "B": 30, "N": 3000}),
    "solve-team": ("inverse('regularized_solve')", 3, {"T": 0, "B": 2, "N": 7000}),
    "polar": ("inverse('regularized_polar')", 1, {"T": 0, "B": 20, "N": 3000}),
    "polar-threads": ("inverse('regularized_polar')", 3, {"T": 0, "B": 20, "N": 3000}),
}


@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c(name, cpu):
    call, threads, sizes = CALLS[name]
    program = PROGRAM.format(call=call, threads=threads, **sizes)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "calls\n"
            time.sleep(0.5)  # until it is in the call
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=20)
        finally:
            process.kill()
    assert output == "heard\nright\n"
    assert process.returncode == 0
