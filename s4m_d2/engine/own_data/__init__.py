"""Own data: from a json and folders to data sets and settings."""
