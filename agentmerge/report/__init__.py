"""What a run has to show: summaries and trackers. Reads the ledger, changes nothing."""
