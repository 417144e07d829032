"""The command line: parse, call, print. Nothing here loads torch before a command needs it."""
