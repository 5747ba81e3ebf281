"""Pictures of a store: the data behind them, one HTML page without other files, and PNG. Torch-free; matplotlib for PNG alone."""
