"""Our search as a part of other people's programs; each module needs the package it is named for.

Knows strategies and plain numbers, no models, no ledger and no session.
"""
