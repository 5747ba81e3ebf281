"""How a model's cache is measured, captured before RoPE, rotated at load and assembled. Knows no model by name."""
