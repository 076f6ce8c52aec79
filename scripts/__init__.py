"""The command line and the developer scripts."""
