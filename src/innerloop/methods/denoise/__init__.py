"""Methods that refine an answer as a whole, from masks, and what they are made of."""
