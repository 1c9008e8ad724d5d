"""Merging and scoring inside vLLM. ``worker`` is the worker, ``engine`` what it starts."""
