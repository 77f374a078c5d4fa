"""The machine a process runs on: its fellow processes, files, the clock, signals, calls that may hang."""
