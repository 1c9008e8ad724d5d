"""Where workers live (``contracts.worker.Host``): in this process, or each in one of its own."""
