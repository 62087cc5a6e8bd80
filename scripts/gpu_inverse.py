"""``regularized_inverse`` on the GPU at hand, each kernel there is and the library's products against the reference:
``scripts/gpu_inverse.py out.json``.

Times one forward pass for a layer (one matrix) and for many heads. The result is checked on the same matrices first.
"""

import json
import sys
from pathlib import Path

import torch
import triton

import tp_kernels as tp
from tp_kernels.ops.regularized_inverse import products
from tp_kernels.ops.regularized_inverse.op import BACKENDS

# Products are what larger matrices get; whether they are ahead of a kernel of ours on smaller ones, this says.
COMPARED = [*(name for name in ("triton", "cuda") if BACKENDS.backends[name].available()[0]), "products"]


def row(batch: int, N: int, power: float) -> dict[str, object]:
    reg = 1e-4 if power == 0.5 else 0.25
    weight = torch.randn(batch, N, N, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) / N**0.5

    def inverse(name: str, matrices: torch.Tensor = weight) -> torch.Tensor:
        if name == "products":
            return products.forward(matrices, torch.tensor(reg, dtype=torch.float64), power)[0]
        # As a layer computes it: nothing waits.
        return tp.regularized_inverse(matrices, reg, power=power, backend=name, check_errors=False)

    exact = inverse("reference", weight.double())
    errors = {name: float((inverse(name) - exact).norm() / exact.norm()) for name in (*COMPARED, "reference")}
    passed = all(errors[name] <= 2 * errors["reference"] + 1e-5 for name in COMPARED)
    times = {
        f"{name}_ms": triton.testing.do_bench(lambda name=name: inverse(name)) if passed else None for name in errors
    }
    return {"batch": batch, "N": N, "power": power, "errors": errors, "passed": passed, **times}


def main() -> None:
    sizes = [(batch, N) for N in (32, 64, 128) for batch in (1, 16)] + [(1, N) for N in (256, 512, 1024)]
    rows = [row(batch, N, power) for power in (0.5, 1.0) for batch, N in sizes]
    Path(sys.argv[1]).write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")
    for found in rows:
        print(found)
    if not all(found["passed"] for found in rows):
        raise SystemExit("no time without a passed check")
    for name in COMPARED:
        ratios = sorted(found[f"{name}_ms"] / found["reference_ms"] for found in rows)
        print(f"{name} / reference, time: {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
