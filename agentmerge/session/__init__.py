"""A search from outside: opened, driven, branched, replayed, served, exported, cleaned up after.

Alone with ``graphs/`` it knows LangGraph.
"""
