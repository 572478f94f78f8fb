"""Methods that loop or skip layers inside the token, and what they are made of."""
