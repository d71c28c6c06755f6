"""Running a command: arguments, processes, the folder of a run, its log and report."""
