"""What crosses from one room to another, and what each room promises: strategies, workers, spaces,
advice, calls of models. Nothing here computes; a plugin imports this room alone."""
