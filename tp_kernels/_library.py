"""Registration with ``torch.library``: one definition, one implementation, one fake per op."""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("tp_kernels", "FRAGMENT")


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define ``tp_kernels::<schema>``: the implementation picks the back-end, the fake gives shapes and dtypes."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tp_kernels::{name}", fake, lib=_LIBRARY)
