"""The command line: flags, environment and TOML into one Config."""
