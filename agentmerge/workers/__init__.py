"""What merges a recipe and scores items; ``agentmerge.contracts.worker`` is the contract."""
