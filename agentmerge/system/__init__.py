"""What is asked of the machine: files read within bounds and written at once, what is waited for,
what is a secret. Knows nothing of models, merges or searches."""
