"""What a value may be: one check of types and bounds, for settings, arguments, recipes and the command line."""
