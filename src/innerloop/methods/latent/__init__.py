"""Methods that think in latents between two markers."""
