"""One suite per plug-in interface: a plug-in's test subclasses it."""
