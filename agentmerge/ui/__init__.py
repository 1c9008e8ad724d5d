"""A live page over a runs directory, in a browser: reads the ledger, starts command lines.

It needs the packages of the extra ``ui``; what it shows is made by the report's rooms.
"""
