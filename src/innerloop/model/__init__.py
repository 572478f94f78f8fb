"""A decoder, a method and what the method trains; losses, distillation, decoders of their own, folders on disk."""
