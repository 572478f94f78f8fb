"""What takes long says what it is doing, to whoever listens."""
