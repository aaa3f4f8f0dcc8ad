"""The command line: configs from yaml layers, components built from them, --help, signals and exit codes."""
