"""What every script stands on: the command line, signals, checkpoints, several processes."""
