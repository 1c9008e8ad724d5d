"""What comes from outside, broken in every way that a seed draws; what became of it is counted."""
