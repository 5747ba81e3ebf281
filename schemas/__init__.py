"""The normative format text, JSON Schemas and their examples."""
