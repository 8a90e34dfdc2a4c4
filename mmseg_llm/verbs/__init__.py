"""The verbs of the command line; their signatures are schema and help."""
