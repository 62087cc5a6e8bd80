"""Writes minimax.h: ``python csrc/regularized_inverse/minimax.py > csrc/regularized_inverse/minimax.h``."""

import numpy as np

DEGREE = 4  # in h = x² - centre
ROWS = 3
TARGET = {"float": 4e-8, "double": 1e-16}  # what the last polynomial may leave


def polynomial(extent: float) -> tuple[float, np.ndarray, float]:
    """The odd polynomial of degree 9 nearest to 1 on [1 - extent, 1 + extent], by Remez exchange.

    Returns the centre, coefficients c of ``x Σ c_j (x² - centre)^j`` and the largest error.
    """
    centre = 1 + extent**2  # of the interval that x² lies in
    theta = np.linspace(0, np.pi, 200001)
    grid = 1 - extent * np.cos(theta)
    x = 1 - extent * np.cos(np.linspace(0, np.pi, DEGREE + 2))
    signs = (-1.0) ** np.arange(DEGREE + 2)
    for _ in range(50):
        basis = x[:, None] * (x[:, None] ** 2 - centre) ** np.arange(DEGREE + 1)
        *coefficients, level = np.linalg.solve(np.column_stack([basis, signs]), np.ones(DEGREE + 2))
        error = grid * np.polyval(coefficients[::-1], grid**2 - centre) - 1
        pieces = np.split(np.arange(len(grid)), np.flatnonzero(np.diff(np.sign(error))) + 1)
        if len(pieces) != DEGREE + 2:  # rounding: the error is that of this arithmetic
            break
        x = grid[[piece[np.abs(error[piece]).argmax()] for piece in pieces]]
        if np.abs(error).max() < abs(level) * (1 + 1e-9):
            break
    return centre, np.array(coefficients), float(np.abs(error).max())


def chain(target: float) -> list[float]:
    """Extents, each of which the polynomial before it leaves; the last leaves ``target``."""
    extents: list[float] = []
    for _ in range(ROWS):
        low, high = 0.0, 0.999
        # Below 1e-3 the error is that of this arithmetic; it goes like extent⁵ there.
        if target < 1e-15:
            probe = 0.02
            low = high = probe * (target / polynomial(probe)[2]) ** (1 / (DEGREE + 1))
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if polynomial(middle)[2] < target else (low, middle)
        target = (low + high) / 2
        extents.insert(0, target)
    return extents


if __name__ == "__main__":
    print("// Written by minimax.py: odd polynomials of degree 9 that are nearest to 1 on [1 - extent, 1 + extent].")
    print("#pragma once\n\nnamespace tpk::TPK_ISA {\n")
    print("// x Σ_j coefficients[j] (x² - centre)^j. What a polynomial leaves is the extent of the next; what the last")
    print("// leaves is at rounding level.")
    print("struct Minimax {\n    double extent, centre, coefficients[5];\n};\n")
    print(f"constexpr int minimax_rows = {ROWS};\n")
    print("template <class T>\nconstexpr Minimax minimax[minimax_rows] = {};")
    for name, target in TARGET.items():
        print(f"template <>\ninline constexpr Minimax minimax<{name}>[minimax_rows] = {{")
        for extent in chain(target):
            centre, coefficients, _ = polynomial(extent)
            print(f"    {{{extent:.17g}, {centre:.17g}, {{{', '.join(f'{c:.17g}' for c in coefficients)}}}}},")
        print("};")
    print("\n}  // namespace tpk::TPK_ISA")
