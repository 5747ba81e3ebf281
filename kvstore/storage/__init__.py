"""Where a store's files live."""
