"""Numbers to numbers, invertibly."""
