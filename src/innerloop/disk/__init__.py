"""Files and folders that are whole or as they were, and who may write a run."""
