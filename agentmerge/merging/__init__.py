"""A recipe's tensors, in memory or on disk, with proof.

``plan`` says what goes into each tensor and loads no torch; ``kernels`` are the formulas,
``family`` merges in memory, ``export`` merges to disk, ``reference`` is mergekit.
"""
