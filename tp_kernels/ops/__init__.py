"""One folder an op; read its ``op.py`` first."""
