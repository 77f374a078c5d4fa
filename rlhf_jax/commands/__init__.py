"""What only the command line calls."""
