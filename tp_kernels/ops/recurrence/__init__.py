"""One recurrence for every cell: its ops, its back-ends and its autograd Function. Read ``op.py`` first."""
