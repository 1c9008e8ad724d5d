"""What a runs directory is called inside."""

LEDGER = "agentmerge.sqlite"
CHECKPOINTS = "checkpoints.sqlite"
