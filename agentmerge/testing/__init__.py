"""Fakes for whoever builds on agentmerge."""
