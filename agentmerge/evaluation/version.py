"""The version of how answers are asked and judged, which is part of every result's key."""

#: Raise it with any change of how an answer becomes an item's value, log-likelihood or margin, or
#: of what an engine is asked for them.
SCORING = 1
