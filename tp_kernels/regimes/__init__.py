"""The regime map: for which T, N and B target propagation beats back-propagation on this machine, and by how much.

``python -m tp_kernels.regimes --help`` is the way in. Read in this order: ``cases`` (what is compared), ``measure``
(how a number is made, and the check it must pass first), ``tasks`` and ``train`` (time to accuracy), ``model`` (the
cost model), ``store`` (where records are kept), ``report`` (what a reader sees).
"""
