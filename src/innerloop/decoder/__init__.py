"""A Hugging Face decoder as embed, layers, norm and head; its caches, kernels, costs and adapters."""
