"""What the transform codec learns for one model, and learning it."""
