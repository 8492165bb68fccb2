"""Layer 7. The command line: parse -> Config -> one call of the pipeline -> render.

`app` owns the entry point, exit codes and errors; each command has a file of its name; `render` draws
progress on stderr and results on stdout. Modules here import typer and the standard library only, the rest
inside the commands, so that `--help` answers at once.
"""
