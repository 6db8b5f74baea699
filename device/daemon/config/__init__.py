"""Settings of the daemon, the file that explains them, and the doctor that checks a board."""
