"""An open search (``search``) and its nodes, and what may be asked of one besides.

Knows no LangGraph: ``graphs/search.py`` says in which order the nodes come.
"""
