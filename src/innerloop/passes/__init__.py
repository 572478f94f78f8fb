"""What f is: one pass over what has been read, over a region of latents, or over tokens of unlike depth."""
