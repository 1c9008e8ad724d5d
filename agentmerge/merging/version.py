"""The version of what merging computes, which is part of every result's key."""

#: Raise it with any change that makes another bit of a merge.
MERGING = 1
