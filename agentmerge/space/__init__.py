"""Unit box to recipe and back, exactly; cheap rivals. Knows no weights and no scores."""
