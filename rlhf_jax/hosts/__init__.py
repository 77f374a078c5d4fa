"""The machine a process runs on: its fellow processes, files, the clock, calls that may hang."""
