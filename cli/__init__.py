"""The command line: parses, calls the library, renders. The only place with typer and rich."""
