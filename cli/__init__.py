"""The `kvstore` command: one module a subcommand, one place that prints, one place that turns errors into exit codes."""
