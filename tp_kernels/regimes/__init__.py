"""The regime map: for which T, N and B target propagation beats back-propagation on this machine, and by how much.

``python -m tp_kernels.regimes --help`` is the way in. Read in this order: ``cases`` (what is compared), ``measure``
(how a number is made, and the check it must pass first), ``tasks`` and ``train`` (time to accuracy), ``store`` (where
records are kept), ``model`` (the cost model), ``summary`` (verdicts and sentences), ``pictures`` and ``report`` (what a
reader sees).
"""
