"""The command line, one file per verb. Parsing lives here; what a verb does is an importable function elsewhere."""
