"""Workers: what merges a recipe and scores items. See ``base.py`` for the contract."""
