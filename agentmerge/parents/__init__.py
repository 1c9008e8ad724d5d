"""From a name to a directory of safetensors, and the tensor list that a family shares.

Knows files: headers, configs, tokenizers, adapters, what has to be made plain before it is merged.
No recipe, no search. ``headers`` and ``layout`` load no torch.
"""
