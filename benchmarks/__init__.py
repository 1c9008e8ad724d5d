"""What is measured for docs/performance.md; run from the repository's root."""
