"""One file per learner; the file's name is its name."""
