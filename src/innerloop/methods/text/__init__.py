"""Methods that write their reasoning, or none: no-CoT, CoT, pause tokens, iCoT."""
