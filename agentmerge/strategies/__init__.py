"""Search strategies, one a file; ``agentmerge.contracts.strategy`` is the contract."""
