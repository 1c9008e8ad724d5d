"""mergekit-evolve and mergenetic as they are published, beside agentmerge, on the demo's family."""
