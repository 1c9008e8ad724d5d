"""Tasks, protocol, scoring and statistics: what is asked of a merge, and what the answers say."""
