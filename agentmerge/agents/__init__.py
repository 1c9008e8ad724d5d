"""The agents: they read the history and write a typed Guidance; strategies decide."""
