"""What is shown in a terminal, and how a process ends."""
