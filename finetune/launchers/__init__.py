"""Where the processes of a run are started, one launcher a file."""
