"""The command line, `edgeear COMMAND`: one file a group of commands."""
