"""What a recipe chooses: frozen dataclasses of methods and of the groups of settings that they share. No torch here."""
