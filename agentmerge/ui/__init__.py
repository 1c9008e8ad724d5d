"""A live page over a runs directory, in a browser: reads the ledger, changes nothing.

It needs the packages of the extra ``ui``; what it shows is made by the report's rooms.
"""
