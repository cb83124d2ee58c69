"""The command line: parses arguments, calls a pipeline and shows the result."""
