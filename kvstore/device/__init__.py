"""The way of values through a GPU: units to a cache, and captured values to levels. Only devices other than the CPU need it."""
