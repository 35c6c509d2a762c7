"""Files that are hostile when they are read and whole when they are written."""
