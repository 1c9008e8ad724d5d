"""Merging: what the parents are, what a recipe makes of each tensor, and the tensors themselves.

``headers`` and ``plan`` read configs and safetensors headers and load no torch; ``kernels`` are the
formulas, ``parents`` merges in memory, ``export`` merges to disk, ``reference`` is mergekit.
"""
